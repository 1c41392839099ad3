//! A virtio device as a PCI function (virtio 1.2, 4.1): one range of memory with all structures, MSI-X or INTA.

use kvm_ops::Gpa;

use super::Device;
use super::guest::{Broken, Watched};
use super::msix::{self, Msix};
use super::registers::{self, Effect, NO_VECTOR, Registers};
use crate::devices::q35::cards::{Access, Card, Signal};
use crate::devices::q35::function::{Capability, Function};

const VENDOR: u16 = 0x1af4;
/// The device numbers of devices without a legacy interface begin here.
const DEVICE_BASE: u16 = 0x1040;
const REVISION: u8 = 1;
/// A number that no legacy driver takes.
const SUBSYSTEM: u16 = 0x1100;

/// The structures in the range, a page each.
const PAGE: u32 = 0x1000;
const COMMON: u32 = 0;
const ISR: u32 = 1;
const CONFIG: u32 = 2;
const NOTIFY: u32 = 3;
const TABLE: u32 = 4;
const PENDING: u32 = 5;
const MEMORY_BYTES: u32 = 8 * PAGE;
/// Bytes between the places by which two queues are notified.
const NOTIFY_STEP: u32 = 4;

/// Ids of capabilities, and types of the vendor's.
const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_ISR: u8 = 3;
const TYPE_DEVICE: u8 = 4;
const TYPE_WINDOW: u8 = 5;

/// Offsets in the capability of the window, through which configuration accesses reach the memory.
const WINDOW_BAR: usize = 4;
const WINDOW_OFFSET: usize = 8;
const WINDOW_LENGTH: usize = 12;
const WINDOW_DATA: usize = 16;
/// The control word of MSI-X.
const MSIX_CONTROL: usize = 2;

/// Bits of the ISR status.
const USED_BUFFER: u8 = 1;
const CONFIG_CHANGE: u8 = 2;

pub(super) struct VirtioPci<D> {
    device: D,
    function: Function,
    registers: Registers,
    msix: Msix,
    isr: u8,
    /// The level of INTA.
    line: bool,
    /// The places of two capabilities: the window's, and that of MSI-X.
    window: usize,
    msix_at: usize,
}

impl<D: Device> VirtioPci<D> {
    pub(super) fn new(device: D) -> Self {
        let msix = Msix::new(D::QUEUES + 1);
        let function = Function::of_card([VENDOR, DEVICE_BASE + D::ID], D::CLASS, REVISION)
            .with_subsystem(VENDOR, SUBSYSTEM)
            .with_memory(MEMORY_BYTES);
        let (function, places) = function.with_capabilities([
            structure(TYPE_COMMON, COMMON, registers::BYTES as u32, &[]),
            structure(
                TYPE_NOTIFY,
                NOTIFY,
                u32::from(D::QUEUES) * NOTIFY_STEP,
                &NOTIFY_STEP.to_le_bytes(),
            ),
            structure(TYPE_ISR, ISR, 1, &[]),
            structure(TYPE_DEVICE, CONFIG, device.config().len() as u32, &[]),
            window(),
            table(D::QUEUES),
        ]);
        let [.., window, msix_at] = places;
        Self {
            registers: Registers::new(device.features(), D::QUEUES, msix.vectors()),
            device,
            function,
            msix,
            isr: 0,
            line: false,
            window,
            msix_at,
        }
    }

    /// Serves a queue, if the driver has set the device up.
    fn notify(&mut self, number: usize, access: &mut Access<'_>) {
        let live = self.registers.is_live() && self.function.is_bus_master();
        let queue = self.registers.queues.get_mut(number);
        let Some(queue) = queue.filter(|queue| live && queue.is_enabled()) else {
            return;
        };
        let memory = Watched::new(access.machine.memory());
        let checked = queue.check(&memory);
        let served = checked.and_then(|()| self.device.notified(number, queue, &memory));
        let (vector, interrupts) = (queue.vector, queue.take_interrupt(&memory));
        if interrupts {
            self.interrupt(USED_BUFFER, vector, access);
        }
        if let Err(why) = served {
            self.fail(&why, access);
        }
    }

    /// Stops, as the driver broke the protocol, until it resets the device.
    fn fail(&mut self, why: &Broken, access: &mut Access<'_>) {
        tracing::warn!(device = D::ID, %why, "a virtio device needs a reset");
        self.device.broken(why);
        self.registers.fail();
        self.interrupt(CONFIG_CHANGE, self.registers.config_vector, access);
    }

    fn interrupt(&mut self, cause: u8, vector: u16, access: &mut Access<'_>) {
        if self.msix.is_enabled() {
            let message = Some(vector).filter(|vector| *vector != NO_VECTOR);
            let message = message.and_then(|vector| self.msix.ask(vector));
            access.signals.extend(message.map(Signal::Message));
        } else {
            self.isr |= cause;
            self.follow_line(access);
        }
    }

    /// Sets INTA to what interrupt status, command register and MSI-X make of it.
    fn follow_line(&mut self, access: &mut Access<'_>) {
        let pending = self.isr != 0;
        self.function.set_interrupt_status(pending);
        let line = pending && self.function.has_intx() && !self.msix.is_enabled();
        if line != self.line {
            self.line = line;
            access.signals.push(Signal::Line(line));
        }
    }

    /// Takes over what was written to the control word of MSI-X.
    fn follow_msix(&mut self, access: &mut Access<'_>) {
        let mut control = [0; 2];
        self.function
            .read(self.msix_at + MSIX_CONTROL, &mut control);
        let messages = self.msix.set_control(u16::from_le_bytes(control));
        access
            .signals
            .extend(messages.into_iter().map(Signal::Message));
    }

    /// The offset in the memory that the window shows, for an access of this width to its data.
    fn shown(&self, at: usize, width: usize) -> Option<u64> {
        let mut fields = [0; WINDOW_DATA];
        self.function.read(self.window, &mut fields);
        let field = |at: usize| {
            fields[at..]
                .first_chunk()
                .map_or(0, |word| u32::from_le_bytes(*word))
        };
        let fits = fields[WINDOW_BAR] == 0 && field(WINDOW_LENGTH) as usize == width;
        (at == self.window + WINDOW_DATA && fits).then_some(field(WINDOW_OFFSET).into())
    }

    fn reset(&mut self, access: &mut Access<'_>) {
        self.isr = 0;
        self.follow_line(access);
    }
}

impl<D: Device> Card for VirtioPci<D> {
    fn type_in(&mut self, input: &[u8], access: &mut Access<'_>) -> usize {
        let taken = self.device.type_in(input);
        if let Some(number) = D::INPUT {
            self.notify(number, access);
        }
        taken
    }

    fn config_read(&mut self, at: usize, data: &mut [u8], access: &mut Access<'_>) {
        match self.shown(at, data.len()) {
            Some(offset) => self.read(offset, data, access),
            None => self.function.read(at, data),
        }
    }

    fn config_write(&mut self, at: usize, data: &[u8], access: &mut Access<'_>) {
        self.function.write(at, data);
        if let Some(offset) = self.shown(at, data.len()) {
            self.write(offset, data, access);
        }
        self.follow_msix(access);
        self.follow_line(access);
    }

    fn offset(&self, gpa: Gpa) -> Option<u64> {
        let offset = gpa.get().checked_sub(self.function.memory_base()?.into())?;
        (offset < MEMORY_BYTES.into()).then_some(offset)
    }

    fn read(&mut self, offset: u64, data: &mut [u8], access: &mut Access<'_>) {
        data.fill(0);
        let at = (offset % u64::from(PAGE)) as usize;
        match (offset / u64::from(PAGE)) as u32 {
            COMMON => self.registers.read(at, data),
            ISR if at == 0 => {
                if let Some(byte) = data.first_mut() {
                    *byte = std::mem::take(&mut self.isr);
                }
                self.follow_line(access);
            }
            CONFIG => {
                let config = self.device.config().iter().skip(at);
                data.iter_mut()
                    .zip(config)
                    .for_each(|(to, byte)| *to = *byte);
            }
            TABLE => self.msix.read(at, data),
            PENDING => self.msix.read_pending(at, data),
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8], access: &mut Access<'_>) {
        let at = (offset % u64::from(PAGE)) as usize;
        match (offset / u64::from(PAGE)) as u32 {
            COMMON => {
                let memory = Watched::new(access.machine.memory());
                match self.registers.write(at, data, &memory) {
                    Effect::None => {}
                    Effect::Reset => self.reset(access),
                    Effect::Broken(why) => self.fail(&why, access),
                }
            }
            NOTIFY => self.notify(at / NOTIFY_STEP as usize, access),
            TABLE => {
                let messages = self.msix.write(at, data);
                access
                    .signals
                    .extend(messages.into_iter().map(Signal::Message));
            }
            _ => {}
        }
    }
}

/// The capability of a structure, which has a page of the memory.
fn structure(kind: u8, page: u32, bytes: u32, more: &[u8]) -> Capability {
    let len = (WINDOW_DATA + more.len()) as u8;
    let mut body = vec![len, kind, 0, 0, 0, 0];
    body.extend([page * PAGE, bytes].map(u32::to_le_bytes).as_flattened());
    body.extend(more);
    Capability {
        id: CAP_VENDOR,
        body,
        writable: Vec::new(),
    }
}

/// The capability of the window: range, offset, length and data are the driver's.
fn window() -> Capability {
    let mut writable = vec![0; WINDOW_DATA + 4];
    writable[WINDOW_BAR] = 0xff;
    writable[WINDOW_OFFSET..].fill(0xff);
    Capability {
        writable: writable.split_off(2),
        ..structure(TYPE_WINDOW, 0, 0, &[0; 4])
    }
}

/// The capability of MSI-X: one vector for configuration changes and one for each queue.
fn table(queues: u16) -> Capability {
    // The field has the number of vectors less one.
    let mut body = queues.to_le_bytes().to_vec();
    body.extend(
        [TABLE * PAGE, PENDING * PAGE]
            .map(u32::to_le_bytes)
            .as_flattened(),
    );
    Capability {
        id: CAP_MSIX,
        body,
        writable: msix::CONTROL_BITS.to_le_bytes().to_vec(),
    }
}
