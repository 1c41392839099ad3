//! The least Q35 that OVMF and Linux need.
//!
//! | file | device |
//! |---|---|
//! | `pci`, `function` | configuration space of memory controller and LPC bridge, by ports and by memory |
//! | `power` | PM1 blocks and timer: switching off |
//! | `fw_cfg` | QEMU's configuration device, with DMA |
//! | `acpi` | the tables that it hands to firmware |
//! | `kernel` | the same tables in memory, for a kernel without firmware |
//! | `ioapic` | the I/O APIC, where the platform has local APICs only |
//! | `cards` | what is in the slots of the PCI bus |
//! | `virtio` | disks and a console |

mod acpi;
mod cards;
mod function;
mod fw_cfg;
mod ioapic;
mod kernel;
mod pci;
mod power;
#[cfg(feature = "virtio")]
mod virtio;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvm_ops::{Answer, Exit, Gpa, Irqchip, VcpuId};

use super::Devices;
use crate::{ConsoleSink, End, ExitContext, ExitHandler, Flow, GuestRam, Image, Inside};

use cards::{Cards, Signal, Target};
use fw_cfg::{FwCfg, Items};
use ioapic::IoApic;
pub(crate) use kernel::describe;
use pci::Pci;
use power::Power;
#[cfg(feature = "virtio")]
pub use virtio::{Disk, DiskCounts};

/// `etc/e820`'s kind of memory that is RAM.
const E820_RAM: u32 = 1;
/// `etc/system-states`: S3 and S4 are not there, S5 is, with the value 0 in SLP_TYP (bit 7: offered).
const SYSTEM_STATES: [u8; 6] = [0x80, 0, 0, 0, 0, 0x80];

/// The ports of a keyboard controller, which is not there: firmware looks for ones in its status, and waits half a second for
/// each answer of a controller that seems to be there.
const KEYBOARD: [u16; 2] = [0x60, 0x64];

/// IA32_APIC_BASE, as a TD asks its host for it: x2APIC mode, and the bit of the processor that boots.
const APIC_BASE: u32 = 0x1b;
const APIC_BASE_VALUE: u64 = 0xfee0_0c00;
const BOOTS: u64 = 1 << 8;

/// An [`ExitHandler`] with the devices of a Q35 that OVMF and Linux need, beside those of [`Devices`].
///
/// | place | device |
/// |---|---|
/// | ports 0xcf8 to 0xcff, memory from where firmware sets PCIEXBAR to, or from 0xb0000000 on for a kernel with [`Image::acpi`] | PCI configuration space: a memory controller (8086:29c0) and an LPC bridge (8086:2918) |
/// | ports 0x600 to 0x67f | power management: timer, and [`End::PowerOff`] |
/// | ports 0x510, 0x511, 0x514 to 0x51b | QEMU's configuration device with DMA: memory map, ACPI tables, a kernel with initrd and command line |
/// | PCI slots 1 to 8, memory where firmware or kernel puts it | disks and a console, with the cargo feature `virtio` |
/// | memory from 0xfec00000 on | an I/O APIC, unless it is in the platform ([`Irqchip::Full`]) |
///
/// Reads of IA32_APIC_BASE are answered as the host of a TD does; other MSRs read 0, and writes to them vanish.
///
/// [`Machine::q35`](crate::Machine::q35) makes one.
///
/// **Not modelled:** other PCI devices, PM events, the TCO watchdog, SMM.
pub struct Q35 {
    devices: Devices,
    /// Set when the serial line interrupts; `None` if the platform has the line.
    serial: Option<Arc<AtomicBool>>,
    chips: Mutex<Chips>,
    cards: Cards,
    #[cfg(feature = "virtio")]
    disks: Vec<virtio::SharedCounts>,
    /// The card that is typed on: the virtio console.
    #[cfg(feature = "virtio")]
    console: Option<usize>,
    start: Instant,
}

struct Chips {
    pci: Pci,
    /// The facts that the ACPI tables tell now.
    facts: acpi::Facts,
    power: Power,
    fw_cfg: FwCfg,
    ioapic: IoApic,
}

impl Q35 {
    /// The devices of a machine with this memory and that many vCPUs. `image` is the firmware with what it may start.
    /// `devices` has the serial line's interrupt, for a machine that has it in the platform.
    pub(crate) fn new(
        ram: &GuestRam,
        vcpus: u32,
        image: Option<&Image>,
        irqchip: Irqchip,
        console: ConsoleSink,
        devices: Option<Devices>,
    ) -> Self {
        let mut items = Items::new(vcpus);
        items.put_file("etc/e820", memory_map(ram));
        items.put_file("etc/system-states", SYSTEM_STATES.to_vec());
        let mut facts = acpi::Facts::new(ram, vcpus, irqchip);
        let mut pci = Pci::new();
        if image.is_some_and(|image| image.acpi) {
            pci.open(kernel::WINDOW.at);
            facts.window = pci.window();
        }
        acpi::put(&mut items, facts);
        if let Some(image) = image {
            add_kernel(&mut items, image);
        }
        let serial = Arc::<AtomicBool>::default();
        let rings = devices.is_none().then(|| Arc::clone(&serial));
        let devices = devices.unwrap_or_else(|| {
            let ring = move || serial.store(true, Ordering::Relaxed);
            Devices::with_serial_interrupt(ram.size(), vcpus, console, ring)
        });
        Self {
            devices,
            serial: rings,
            chips: Mutex::new(Chips {
                pci,
                facts,
                power: Power::default(),
                fw_cfg: FwCfg::new(items),
                ioapic: IoApic::new(),
            }),
            cards: Cards::default(),
            #[cfg(feature = "virtio")]
            disks: Vec::new(),
            #[cfg(feature = "virtio")]
            console: None,
            start: Instant::now(),
        }
    }

    /// Puts a disk into the next free slot of the PCI bus, as a virtio block device: it has INTA and MSI-X, and needs neither
    /// of them. Its driver may use memory that the guest shares, as all devices.
    ///
    /// # Errors
    /// [`MachineError::Slots`](crate::MachineError::Slots) if eight devices are there already.
    #[cfg(feature = "virtio")]
    pub fn with_disk(mut self, disk: Disk) -> Result<Self, crate::MachineError> {
        let counts = disk.counts();
        self.plug(virtio::block(disk))?;
        self.disks.push(counts);
        Ok(self)
    }

    /// Puts a virtio console into the next free slot of the PCI bus, which Linux knows as /dev/hvc0. It prints there what the
    /// guest sends, and gets what is typed ([`type_console`](Self::type_console)), through memory that the guest shares. Of
    /// several consoles the one that was added last gets what is typed.
    ///
    /// # Errors
    /// As [`with_disk`](Self::with_disk).
    #[cfg(feature = "virtio")]
    pub fn with_console(mut self, output: ConsoleSink) -> Result<Self, crate::MachineError> {
        self.console = Some(self.plug(virtio::console(output))?);
        Ok(self)
    }

    #[cfg(feature = "virtio")]
    fn plug(&mut self, card: Box<dyn cards::Card>) -> Result<usize, crate::MachineError> {
        let slots = cards::SLOTS.into();
        let number = self.cards.plug(card);
        number.ok_or(crate::MachineError::Slots { slots })
    }

    /// Types on the virtio console, from any thread, and interrupts where the guest has given room. Answers how many bytes are
    /// taken: up to 4096 wait for room. Without such a console it is none.
    #[cfg(feature = "virtio")]
    pub fn type_console(&self, input: &[u8], machine: &dyn Inside) -> usize {
        let card = self.console;
        let typed = card.and_then(|card| self.cards.type_in(card, input, machine));
        let Some((taken, line, signals)) = typed else {
            return 0;
        };
        signals
            .into_iter()
            .for_each(|signal| self.send(signal, line, machine));
        taken
    }

    /// The things that the guest has done with each disk, in the order in which they were added.
    #[cfg(feature = "virtio")]
    pub fn disk_counts(&self) -> Vec<DiskCounts> {
        let now =
            |counts: &virtio::SharedCounts| *counts.lock().unwrap_or_else(PoisonError::into_inner);
        self.disks.iter().map(now).collect()
    }

    /// The devices at the places that every PC has.
    pub const fn devices(&self) -> &Devices {
        &self.devices
    }

    /// Changes those devices.
    #[must_use]
    pub fn map_devices(self, change: impl FnOnce(Devices) -> Devices) -> Self {
        Self {
            devices: change(self.devices),
            ..self
        }
    }

    /// Types on the serial line, from any thread, and interrupts. Answers how many bytes found room.
    pub fn type_serial(&self, input: &[u8], machine: &dyn Inside) -> usize {
        let typed = self.devices.type_serial(input);
        self.ring(machine);
        typed
    }

    fn with_chips<T>(&self, f: impl FnOnce(&mut Chips) -> T) -> T {
        // No panic happens under the lock.
        f(&mut self.chips.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Hands an exit to the devices of every PC, and sends the serial line's interrupt.
    fn on_devices(&self, exit: &mut ExitContext<'_>) -> Flow {
        let flow = self.devices.handle(exit);
        self.ring(exit.machine());
        flow
    }

    /// Sends the serial line's interrupt, if it has risen.
    fn ring(&self, machine: &dyn Inside) {
        if let Some(serial) = &self.serial
            && serial.swap(false, Ordering::Relaxed)
        {
            self.rise(Devices::SERIAL_LINE as usize, machine);
        }
    }

    fn rise(&self, input: usize, machine: &dyn Inside) {
        if let Some(message) = self.with_chips(|chips| chips.ioapic.rise(input))
            && let Err(error) = machine.signal_msi(message)
        {
            tracing::warn!(input, %error, "an input of the I/O APIC did not interrupt");
        }
    }

    /// Sends what a card asks for.
    fn send(&self, signal: Signal, line: u32, machine: &dyn Inside) {
        let sent = match signal {
            Signal::Message(message) => machine.signal_msi(message).map(drop),
            Signal::Line(active) if self.serial.is_none() => machine.set_irq_line(line, active),
            Signal::Line(active) => {
                if active {
                    self.rise(line as usize, machine);
                }
                Ok(())
            }
        };
        if let Err(error) = sent {
            tracing::warn!(?signal, line, %error, "a PCI device did not interrupt");
        }
    }

    /// Hands an exit to the card that it is for; false if it is for none.
    fn on_cards(&self, exit: &mut ExitContext<'_>) -> bool {
        let (target, write, width) = match exit.exit() {
            _ if self.cards.is_empty() => return false,
            // Ports are many, and most exits are for others.
            Exit::IoIn { port, .. } | Exit::IoOut { port, .. } if !pci::shows(port) => {
                return false;
            }
            Exit::IoIn { port, size, .. } => (self.at_port(port), false, size.into()),
            Exit::IoOut { port, size, .. } => (self.at_port(port), true, size.into()),
            Exit::MmioRead { gpa, .. } => (Some(self.at_address(gpa)), false, usize::MAX),
            Exit::MmioWrite { gpa, .. } => (Some(self.at_address(gpa)), true, usize::MAX),
            _ => return false,
        };
        let Some(target) = target else {
            return false;
        };
        let machine = exit.machine();
        for item in exit.data().chunks_mut(width.max(1)) {
            let Some((line, signals)) = self.cards.access(target, write, item, machine) else {
                return false;
            };
            signals
                .into_iter()
                .for_each(|signal| self.send(signal, line, machine));
        }
        true
    }

    /// The configuration space that a port shows.
    fn at_port(&self, port: u16) -> Option<Target> {
        let selected = self.with_chips(|chips| chips.pci.selected(port));
        selected.map(|(function, at)| Target::Config(function, at))
    }

    /// The configuration space that an address shows, or the memory there.
    fn at_address(&self, gpa: Gpa) -> Target {
        let shown = self.with_chips(|chips| chips.pci.in_window(gpa));
        shown.map_or(Target::Memory(gpa), |(function, at)| {
            Target::Config(function, at)
        })
    }

    /// The guest's time, or the host's where the platform does not tell it.
    fn time(&self, exit: &ExitContext<'_>) -> Duration {
        exit.time().unwrap_or_else(|| self.start.elapsed())
    }
}

impl Chips {
    /// Answers a read of a port; false if no chip is there.
    fn port_in(&mut self, port: u16, item: &mut [u8], time: Duration) -> bool {
        match port {
            pci::ADDRESS if item.len() == 4 => {
                item.copy_from_slice(&self.pci.address().to_le_bytes());
            }
            pci::DATA..=pci::DATA_LAST => self.pci.port_read(port, item),
            power::BASE..=power::LAST => self.power.read(port, time, item),
            fw_cfg::DATA => self.fw_cfg.read(item),
            fw_cfg::DMA..=fw_cfg::DMA_LAST => FwCfg::dma_read(port, item),
            _ if KEYBOARD.contains(&port) => item.fill(0xff),
            _ => return false,
        }
        true
    }

    /// Takes a write to a port; `None` if no chip is there.
    fn port_out(&mut self, port: u16, item: &[u8], machine: &dyn Inside) -> Option<Flow> {
        match port {
            pci::ADDRESS if item.len() == 4 => {
                let address = item.try_into().map_or(0, u32::from_le_bytes);
                self.pci.set_address(address);
            }
            pci::DATA..=pci::DATA_LAST => {
                self.pci.port_write(port, item);
                self.follow_window();
            }
            power::BASE..=power::LAST => {
                if self.power.write(port, item) {
                    return Some(Flow::End(End::PowerOff));
                }
            }
            fw_cfg::SELECTOR => {
                if let [low, high] = *item {
                    self.fw_cfg.select(u16::from_le_bytes([low, high]));
                }
            }
            fw_cfg::DMA..=fw_cfg::DMA_LAST => {
                self.fw_cfg.dma_write(port, item, &machine.memory());
            }
            _ => return None,
        }
        Some(Flow::Continue)
    }

    /// Answers a read of memory without RAM; false if no chip is there.
    fn read(&mut self, gpa: Gpa, data: &mut [u8]) -> bool {
        if let Some((function, at)) = self.pci.in_window(gpa) {
            self.pci.read(function, at, data);
            return true;
        }
        let Some(offset) = in_ioapic(gpa) else {
            return false;
        };
        let value = self.ioapic.read(offset).to_le_bytes();
        for (byte, at) in data.iter_mut().zip(0..) {
            *byte = value.get::<usize>(at).copied().unwrap_or(0);
        }
        true
    }

    /// Takes a write to memory without RAM; false if no chip is there.
    fn write(&mut self, gpa: Gpa, data: &[u8]) -> bool {
        if let Some((function, at)) = self.pci.in_window(gpa) {
            self.pci.write(function, at, data);
            self.follow_window();
            return true;
        }
        let Some(offset) = in_ioapic(gpa) else {
            return false;
        };
        let mut value = [0; 4];
        let len = data.len().min(4);
        value[..len].copy_from_slice(&data[..len]);
        self.ioapic.write(offset, u32::from_le_bytes(value));
        true
    }

    /// Tells the ACPI tables where the memory window of the configuration space is, if a write has moved it. Tables that firmware
    /// has looked at stay: it may read one file early and the next one late, and they belong together.
    fn follow_window(&mut self) {
        let window = self.pci.window();
        let shown = || {
            acpi::FILES
                .into_iter()
                .any(|file| self.fw_cfg.has_shown(file))
        };
        if window != self.facts.window && !shown() {
            self.facts.window = window;
            acpi::put(self.fw_cfg.items_mut(), self.facts);
        }
    }
}

fn in_ioapic(gpa: Gpa) -> Option<u64> {
    let offset = gpa.get().checked_sub(ioapic::BASE)?;
    (offset < ioapic::BYTES).then_some(offset)
}

impl ExitHandler for Q35 {
    fn handle(&self, exit: &mut ExitContext<'_>) -> Flow {
        if self.on_cards(exit) {
            return Flow::Continue;
        }
        match exit.exit() {
            Exit::IoIn { port, size, .. } => {
                let time = self.time(exit);
                let items = exit.data().chunks_mut(size.max(1).into());
                let mut chips = items.map(|item| self.with_chips(|c| c.port_in(port, item, time)));
                if chips.all(|there| there) {
                    return Flow::Continue;
                }
            }
            Exit::IoOut { port, size, .. } => {
                let machine = exit.machine();
                for item in exit.data().chunks(size.max(1).into()) {
                    match self.with_chips(|chips| chips.port_out(port, item, machine)) {
                        Some(Flow::Continue) => {}
                        Some(flow) => return flow,
                        None => return self.on_devices(exit),
                    }
                }
                return Flow::Continue;
            }
            Exit::MmioRead { gpa, .. } => {
                return match self.with_chips(|chips| chips.read(gpa, exit.data())) {
                    true => Flow::Continue,
                    false => self.on_devices(exit),
                };
            }
            Exit::MmioWrite { gpa, .. } => {
                return match self.with_chips(|chips| chips.write(gpa, exit.data())) {
                    true => Flow::Continue,
                    false => self.on_devices(exit),
                };
            }
            Exit::ReadMsr { index } => {
                return answer(exit, Answer::Msr(read_msr(index, exit.vcpu())));
            }
            // Taken, and not kept.
            Exit::WriteMsr { .. } => return Flow::Continue,
            _ => {}
        }
        self.on_devices(exit)
    }
}

fn answer(exit: &mut ExitContext<'_>, answer: Answer) -> Flow {
    match exit.answer(answer) {
        Ok(()) => Flow::Continue,
        Err(_) => Flow::End(End::Unhandled(exit.exit().kind())),
    }
}

fn read_msr(index: u32, vcpu: VcpuId) -> u64 {
    match index {
        APIC_BASE if vcpu.0 == 0 => APIC_BASE_VALUE | BOOTS,
        APIC_BASE => APIC_BASE_VALUE,
        _ => 0,
    }
}

/// `etc/e820`: address, length and kind of each piece of RAM.
fn memory_map(ram: &GuestRam) -> Vec<u8> {
    let mut map = Vec::new();
    for (start, bytes) in ram.ram_ranges() {
        map.extend([start.get(), bytes].map(u64::to_le_bytes).as_flattened());
        map.extend(E820_RAM.to_le_bytes());
    }
    map
}

fn add_kernel(items: &mut Items, image: &Image) {
    if let Some(kernel) = &image.kernel {
        items.set_kernel(kernel);
        // Also an empty one: its hash is measured.
        items.set_cmdline(image.cmdline.as_deref().unwrap_or_default());
    }
    if let Some(initrd) = &image.initrd {
        items.set_initrd(initrd);
    }
}

#[cfg(test)]
mod tests;
