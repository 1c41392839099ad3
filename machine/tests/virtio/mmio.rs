//! The MMIO transport of virtio 1.2 (4.2): the registers of one device with its queues. It knows neither a
//! host nor a kind of VM, and what the device does is another's.

use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_ops::{Exit, Gpa};
use kvm_ops_machine::{DeviceMemory, ExitContext, Inside};
use virtio_queue::{Queue, QueueT};

/// Registers, by offset.
const MAGIC: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const VENDOR_ID: u64 = 0x00c;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SEL: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_NUM_MAX: u64 = 0x034;
const QUEUE_NUM: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
pub(crate) const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESC: u64 = 0x080;
const QUEUE_DESC_HIGH: u64 = 0x084;
const QUEUE_DRIVER: u64 = 0x090;
const QUEUE_DRIVER_HIGH: u64 = 0x094;
const QUEUE_DEVICE: u64 = 0x0a0;
const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
const CONFIG_GENERATION: u64 = 0x0fc;
/// The end of the registers, and the size of the device.
pub(crate) const SIZE: u64 = 0x200;

/// Bits of the status register.
const FEATURES_OK: u32 = 8;
const DRIVER_OK: u32 = 4;
pub(crate) const NEEDS_RESET: u32 = 64;

/// Bits of the interrupt status register.
const USED_BUFFER: u32 = 1;
const CONFIG_CHANGE: u32 = 2;

const VIRTIO_F_VERSION_1: u64 = 1 << 32;
/// The device reaches what the platform lets it: the guest shares memory with it.
const VIRTIO_F_ACCESS_PLATFORM: u64 = 1 << 33;
const OFFERED: u64 = VIRTIO_F_VERSION_1 | VIRTIO_F_ACCESS_PLATFORM;

pub(crate) const QUEUE_MAX: u16 = 16;

pub(crate) struct Registers {
    device_id: u32,
    status: u32,
    interrupt_status: u32,
    features: u64,
    features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    pub(crate) queues: Vec<Queue>,
}

impl Registers {
    fn new(device_id: u32, queues: usize) -> Self {
        let queue = || Queue::new(QUEUE_MAX).expect("a power of two");
        Self {
            device_id,
            status: 0,
            interrupt_status: 0,
            features: 0,
            features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            queues: (0..queues).map(|_| queue()).collect(),
        }
    }

    fn read(&self, at: u64) -> u32 {
        let queue = self.queues.get(self.queue_sel as usize);
        match at {
            MAGIC => u32::from_le_bytes(*b"virt"),
            VERSION => 2,
            DEVICE_ID => self.device_id,
            VENDOR_ID => u32::from_le_bytes(*b"test"),
            DEVICE_FEATURES => half(OFFERED, self.features_sel),
            QUEUE_NUM_MAX => queue.map_or(0, |queue| queue.max_size().into()),
            QUEUE_READY => queue.is_some_and(QueueT::ready).into(),
            INTERRUPT_STATUS => self.interrupt_status,
            STATUS => self.status,
            CONFIG_GENERATION => 0,
            _ => 0,
        }
    }

    /// Writes a register. True if the driver must be told of a change by an interrupt.
    fn write(&mut self, at: u64, value: u32, memory: &DeviceMemory<'_>) -> bool {
        match at {
            DEVICE_FEATURES_SEL => self.features_sel = value,
            DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            DRIVER_FEATURES if self.status & FEATURES_OK == 0 => {
                let shift = if self.driver_features_sel == 0 { 0 } else { 32 };
                self.features &= !(0xffff_ffff << shift);
                self.features |= u64::from(value) << shift;
            }
            QUEUE_SEL => self.queue_sel = value,
            INTERRUPT_ACK => self.interrupt_status &= !value,
            STATUS => self.set_status(value),
            _ => return self.write_queue(at, value, memory),
        }
        false
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            *self = Self::new(self.device_id, self.queues.len());
            return;
        }
        self.status = value;
        let accepted = self.features & !OFFERED == 0 && self.features & VIRTIO_F_VERSION_1 != 0;
        if !accepted {
            self.status &= !FEATURES_OK;
        }
    }

    fn write_queue(&mut self, at: u64, value: u32, memory: &DeviceMemory<'_>) -> bool {
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize) else {
            return false;
        };
        match at {
            QUEUE_NUM => queue.set_size(value as u16),
            QUEUE_READY => {
                queue.set_ready(value == 1);
                // Rings that the guest does not share, or that are no memory, are of no use.
                if value == 1 && !queue.is_valid(memory) {
                    queue.set_ready(false);
                    return self.fail();
                }
            }
            QUEUE_DESC => queue.set_desc_table_address(Some(value), None),
            QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            QUEUE_DRIVER => queue.set_avail_ring_address(Some(value), None),
            QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
            QUEUE_DEVICE => queue.set_used_ring_address(Some(value), None),
            QUEUE_DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
        false
    }

    /// The device cannot go on; the driver finds it out from the status.
    pub(crate) fn fail(&mut self) -> bool {
        self.status |= NEEDS_RESET;
        self.interrupt_status |= CONFIG_CHANGE;
        true
    }

    /// The driver has set the device up, and the device is well.
    pub(crate) fn is_live(&self) -> bool {
        self.status & (DRIVER_OK | FEATURES_OK | NEEDS_RESET) == DRIVER_OK | FEATURES_OK
    }

    pub(crate) fn used_buffer(&mut self) {
        self.interrupt_status |= USED_BUFFER;
    }
}

fn half(features: u64, which: u32) -> u32 {
    match which {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

/// The transport: a window of guest-physical addresses, and an interrupt line.
pub(crate) struct Mmio {
    base: Gpa,
    gsi: u32,
    registers: Mutex<Registers>,
}

impl Mmio {
    pub(crate) fn new(base: Gpa, gsi: u32, device_id: u32, queues: usize) -> Self {
        Self {
            base,
            gsi,
            registers: Mutex::new(Registers::new(device_id, queues)),
        }
    }

    pub(crate) fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) const fn gsi(&self) -> u32 {
        self.gsi
    }

    /// The address that a driver notifies the device by.
    pub(crate) const fn bell(&self) -> Gpa {
        Gpa::new(self.base.get() + QUEUE_NOTIFY)
    }

    /// Answers an access to the window. False if the exit is none.
    pub(crate) fn handle(&self, exit: &mut ExitContext<'_>) -> bool {
        let (gpa, read) = match exit.exit() {
            Exit::MmioRead { gpa, .. } => (gpa, true),
            Exit::MmioWrite { gpa, .. } => (gpa, false),
            _ => return false,
        };
        let Some(at) = gpa
            .get()
            .checked_sub(self.base.get())
            .filter(|at| *at < SIZE)
        else {
            return false;
        };
        let machine = exit.machine();
        // Registers are 32 bits wide, and drivers access them so.
        let Ok(data) = <&mut [u8; 4]>::try_from(exit.data()) else {
            return true;
        };
        if read {
            *data = self.registers().read(at).to_le_bytes();
        } else {
            let value = u32::from_le_bytes(*data);
            let interrupts = self.registers().write(at, value, &machine.memory());
            if interrupts {
                pulse(machine, self.gsi);
            }
        }
        true
    }
}

/// An edge on an interrupt line. A VM without interrupts has a driver that polls.
fn pulse(machine: &dyn Inside, gsi: u32) {
    for level in [true, false] {
        if let Err(error) = machine.set_irq_line(gsi, level) {
            eprintln!("no interrupt: {error}");
        }
    }
}
