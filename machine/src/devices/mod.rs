//! The devices of a PC that guests look for before they have drivers.

mod cmos;
mod q35;

use std::convert::Infallible;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};

use kvm_ops::{Answer, Exit};

use crate::{ConsoleSink, End, ExitContext, ExitHandler, Flow};

use cmos::Cmos;
pub use q35::Q35;
pub(crate) use q35::describe;
#[cfg(feature = "virtio")]
pub use q35::{Disk, DiskCounts};

/// The first port of the first serial line, and the last.
const SERIAL: u16 = 0x3f8;
const SERIAL_LAST: u16 = SERIAL + 7;
/// Bochs's debug port, and the one that SeaBIOS and OVMF use on QEMU.
const BOCHS_DEBUG: u16 = 0xe9;
const QEMU_DEBUG: u16 = 0x402;
/// The value of a debug port, which tells that it exists.
const DEBUG_PRESENT: u8 = 0xe9;
/// The index and data ports of CMOS.
const CMOS_INDEX: u16 = 0x70;
const CMOS_DATA: u16 = 0x71;
/// The keyboard controller.
const I8042_DATA: u16 = 0x60;
const I8042_COMMAND: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;
/// The address register of PCI configuration space, and the reset control register beside it.
const PCI_ADDRESS: u16 = 0xcf8;
const PCI_ADDRESS_LAST: u16 = PCI_ADDRESS + 3;
const RESET_CONTROL: u16 = 0xcf9;
const RESET_CPU: u8 = 1 << 2;
/// QEMU's isa-debug-exit, where kvm-unit-tests and where its own default put it.
const DEBUG_EXIT: [u16; 2] = [0xf4, 0x501];

/// Linux's answer to a hypercall that there is none (`KVM_ENOSYS`, `uapi/linux/kvm_para.h`).
const KVM_ENOSYS: u64 = 1000;
const EOPNOTSUPP: u64 = 95;

/// A default [`ExitHandler`]: the devices that firmware, kernels and test guests look for.
///
/// | ports | device |
/// |---|---|
/// | 0x3f8 to 0x3ff | a 16550 serial line (vm-superio), output to the console |
/// | 0xe9, 0x402 | debug ports, output to the console; reading answers 0xe9 |
/// | 0x70, 0x71 | CMOS: memory size, number of vCPUs, UTC time |
/// | 0xcf8 to 0xcff | PCI configuration space without a device |
/// | 0xcf9, 0x64 | reset control and the keyboard controller's reset: [`End::Reset`] |
/// | 0xf4, 0x501 | debug exit: [`End::DebugExit`] |
///
/// Writes elsewhere (the POST code at 0x80, for one) vanish, and reads answer all ones, as on a bus
/// without a driver on the lines. Requests of confidential guests and hypercalls are answered with
/// an error, and MSRs with #GP.
///
/// **Not modelled:** keyboard input, timers and interrupt controllers (use
/// [`Irqchip::Full`](kvm_ops::Irqchip::Full)), PCI and ACPI (use [`Q35`]), disks, network, video.
pub struct Devices {
    state: Mutex<State>,
    debug: ConsoleSink,
}

struct State {
    serial: Serial<SerialIrq, NoEvents, ConsoleSink>,
    cmos: Cmos,
    pci_address: u32,
}

/// The interrupt of the serial line.
#[derive(Default)]
struct SerialIrq(Option<Box<dyn Fn() + Send>>);

impl Trigger for SerialIrq {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        if let Some(raise) = &self.0 {
            raise();
        }
        Ok(())
    }
}

impl Devices {
    /// The interrupt line of the first serial port of a PC.
    pub const SERIAL_LINE: u32 = 4;

    /// The devices of a machine with that much RAM and that many vCPUs.
    pub fn new(ram_bytes: u64, vcpus: u32, console: ConsoleSink) -> Self {
        Self::with(ram_bytes, vcpus, console, SerialIrq::default())
    }

    /// As [`new`](Self::new), and `raise` is called whenever the serial line interrupts
    /// ([`SERIAL_LINE`](Self::SERIAL_LINE)). Without it the line is silent, and guests must poll. It is called in the middle of an
    /// access, so it must not come back to these devices.
    pub fn with_serial_interrupt(
        ram_bytes: u64,
        vcpus: u32,
        console: ConsoleSink,
        raise: impl Fn() + Send + 'static,
    ) -> Self {
        Self::with(ram_bytes, vcpus, console, SerialIrq(Some(Box::new(raise))))
    }

    fn with(ram_bytes: u64, vcpus: u32, console: ConsoleSink, irq: SerialIrq) -> Self {
        Self {
            state: Mutex::new(State {
                serial: Serial::new(irq, console.clone()),
                cmos: Cmos::new(ram_bytes, vcpus),
                pci_address: 0,
            }),
            debug: console,
        }
    }

    /// Sends what is printed on the debug ports elsewhere than the serial line's.
    #[must_use]
    pub fn debug_console(mut self, console: ConsoleSink) -> Self {
        self.debug = console;
        self
    }

    /// Stops the clock of the CMOS at a time, in seconds since 1970-01-01 UTC, so that a guest sees the
    /// same in each run. Without it the clock is the host's.
    #[must_use]
    pub fn stop_clock(self, at: u64) -> Self {
        self.with_state(|state| state.cmos.stop_clock(at));
        self
    }

    /// Types on the serial line. Answers how many bytes found room.
    pub fn type_serial(&self, input: &[u8]) -> usize {
        self.with_state(|state| {
            let input = &input[..input.len().min(state.serial.fifo_capacity())];
            // The trigger cannot fail, and there is room.
            state.serial.enqueue_raw_bytes(input).unwrap_or(0)
        })
    }

    fn with_state<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        // A panic in the embedder's interrupt closure leaves the devices as they were.
        f(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn port_in(&self, port: u16, item: &mut [u8]) {
        self.with_state(|state| {
            if port == PCI_ADDRESS && item.len() == 4 {
                item.copy_from_slice(&state.pci_address.to_le_bytes());
                return;
            }
            item.fill(0xff);
            // There is no port above 0xffff.
            for (port, byte) in (port..=u16::MAX).zip(item) {
                *byte = match port {
                    SERIAL..=SERIAL_LAST => state.serial.read((port - SERIAL) as u8),
                    BOCHS_DEBUG | QEMU_DEBUG => DEBUG_PRESENT,
                    CMOS_DATA => state.cmos.read(),
                    I8042_DATA | I8042_COMMAND => 0,
                    _ => continue,
                };
            }
        });
    }

    fn port_out(&self, port: u16, item: &[u8]) -> Flow {
        if DEBUG_EXIT.contains(&port) {
            let mut value = [0; 4];
            value[..item.len().min(4)].copy_from_slice(&item[..item.len().min(4)]);
            return Flow::End(End::DebugExit(u32::from_le_bytes(value)));
        }
        self.with_state(|state| {
            if port == PCI_ADDRESS
                && let Ok(address) = item.try_into()
            {
                state.pci_address = u32::from_le_bytes(address);
                return Flow::Continue;
            }
            for (port, byte) in (port..=u16::MAX).zip(item) {
                match port {
                    SERIAL..=SERIAL_LAST => {
                        // Neither the console nor the trigger fails towards the guest.
                        let _ = state.serial.write((port - SERIAL) as u8, *byte);
                    }
                    BOCHS_DEBUG | QEMU_DEBUG => self.debug.print(&[*byte]),
                    CMOS_INDEX => state.cmos.select(*byte),
                    I8042_COMMAND if *byte == I8042_RESET => return Flow::End(End::Reset),
                    RESET_CONTROL if byte & RESET_CPU != 0 => return Flow::End(End::Reset),
                    PCI_ADDRESS..=PCI_ADDRESS_LAST => {}
                    _ => {}
                }
            }
            Flow::Continue
        })
    }
}

impl ExitHandler for Devices {
    fn handle(&self, context: &mut ExitContext<'_>) -> Flow {
        let answer = match context.exit() {
            Exit::IoIn { port, size, .. } => {
                for item in context.data().chunks_mut(size.max(1).into()) {
                    self.port_in(port, item);
                }
                return Flow::Continue;
            }
            Exit::IoOut { port, size, .. } => {
                return context
                    .data()
                    .chunks(size.max(1).into())
                    .map(|item| self.port_out(port, item))
                    .find(|flow| *flow != Flow::Continue)
                    .unwrap_or(Flow::Continue);
            }
            Exit::MmioRead { .. } => {
                context.data().fill(0xff);
                return Flow::Continue;
            }
            Exit::MmioWrite { .. } | Exit::IrqWindow | Exit::Interrupted => return Flow::Continue,
            Exit::MapGpaRange { .. } => Answer::Value(EOPNOTSUPP),
            Exit::Hypercall { .. } => Answer::Value(KVM_ENOSYS.wrapping_neg()),
            Exit::ReadMsr { .. } | Exit::WriteMsr { .. } => Answer::InjectGp,
            Exit::MemoryFault { gpa, access, .. } => {
                return Flow::End(End::MemoryFault { gpa, access });
            }
            exit => return Flow::End(End::Unhandled(exit.kind())),
        };
        match context.answer(answer) {
            Ok(()) => Flow::Continue,
            Err(error) => Flow::End(End::Failed(error)),
        }
    }
}

impl fmt::Debug for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Devices")
            .field("debug", &self.debug)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Alone;
    use kvm_ops::VcpuId;

    fn devices() -> (Devices, ConsoleSink) {
        let console = ConsoleSink::capture();
        (Devices::new(128 << 20, 2, console.clone()), console)
    }

    /// Handles an exit; returns the decision and the answer.
    fn handle(devices: &Devices, exit: Exit, data: &mut [u8]) -> (Flow, Option<Answer>) {
        let machine = Alone::new();
        let mut context = ExitContext::new(VcpuId(0), exit, data, &machine);
        let flow = devices.handle(&mut context);
        (flow, context.answered())
    }

    fn out(devices: &Devices, port: u16, size: u8, data: &[u8]) -> Flow {
        let count = data.len() as u32 / u32::from(size);
        let exit = Exit::IoOut { port, size, count };
        handle(devices, exit, &mut data.to_vec()).0
    }

    fn input<const N: usize>(devices: &Devices, port: u16, size: u8) -> [u8; N] {
        let mut bytes = [0x5a; N];
        let count = N as u32 / u32::from(size);
        let exit = Exit::IoIn { port, size, count };
        assert_eq!(handle(devices, exit, &mut bytes).0, Flow::Continue);
        bytes
    }

    #[test]
    fn serial_and_debug_ports_print_bytes_and_strings_of_bytes() {
        let (devices, console) = devices();
        assert_eq!(out(&devices, SERIAL, 1, b"a"), Flow::Continue);
        assert_eq!(out(&devices, SERIAL, 1, b"bc"), Flow::Continue);
        assert_eq!(out(&devices, QEMU_DEBUG, 1, b"d"), Flow::Continue);
        assert_eq!(out(&devices, BOCHS_DEBUG, 1, b"e"), Flow::Continue);
        assert_eq!(console.text(), "abcde");
        for port in [QEMU_DEBUG, BOCHS_DEBUG] {
            assert_eq!(input::<1>(&devices, port, 1), [0xe9]);
        }
        // Line status: transmitter empty.
        assert_eq!(input::<1>(&devices, SERIAL + 5, 1)[0] & 0x60, 0x60);
    }

    #[test]
    fn typed_bytes_are_read_in_order() {
        let (devices, _) = devices();
        assert_eq!(devices.type_serial(b"hi"), 2);
        assert_eq!(input::<1>(&devices, SERIAL, 1), *b"h");
        assert_eq!(input::<1>(&devices, SERIAL, 1), *b"i");
        assert!(devices.type_serial(&[0; 10_000]) < 10_000);
    }

    #[test]
    fn ports_without_a_device_read_all_ones_and_swallow_writes() {
        let (devices, console) = devices();
        for port in [0, 0x80, 0x510, 0xffff] {
            assert_eq!(out(&devices, port, 4, &[1; 4]), Flow::Continue);
            assert_eq!(input::<4>(&devices, port, 4), [0xff; 4]);
        }
        assert_eq!(console.printed(), 0);
    }

    #[test]
    fn pci_has_a_mechanism_and_no_device() {
        let (devices, _) = devices();
        assert_eq!(
            out(&devices, PCI_ADDRESS, 4, &0x8000_0000_u32.to_le_bytes()),
            Flow::Continue
        );
        assert_eq!(
            input::<4>(&devices, PCI_ADDRESS, 4),
            0x8000_0000_u32.to_le_bytes()
        );
        assert_eq!(input::<4>(&devices, 0xcfc, 4), [0xff; 4]);
        // A configuration address is no reset, whatever its second byte.
        assert_eq!(
            out(&devices, PCI_ADDRESS, 4, &0x8000_0400_u32.to_le_bytes()),
            Flow::Continue
        );
    }

    #[test]
    fn resets_and_debug_exits_end_the_machine() {
        let (devices, _) = devices();
        assert_eq!(
            out(&devices, I8042_COMMAND, 1, &[0xfe]),
            Flow::End(End::Reset)
        );
        assert_eq!(out(&devices, I8042_COMMAND, 1, &[0xd1]), Flow::Continue);
        assert_eq!(out(&devices, RESET_CONTROL, 1, &[6]), Flow::End(End::Reset));
        assert_eq!(out(&devices, RESET_CONTROL, 1, &[2]), Flow::Continue);
        assert_eq!(
            out(&devices, 0xf4, 4, &7_u32.to_le_bytes()),
            Flow::End(End::DebugExit(7))
        );
        assert_eq!(out(&devices, 0x501, 1, &[3]), Flow::End(End::DebugExit(3)));
    }

    #[test]
    fn what_no_device_can_answer_is_answered_with_an_error() {
        let (devices, _) = devices();
        let call = Exit::Hypercall {
            nr: 12,
            args: [0; 6],
        };
        let enosys = Answer::Value(-1000_i64 as u64);
        assert_eq!(
            handle(&devices, call, &mut []),
            (Flow::Continue, Some(enosys))
        );
        let read = Exit::ReadMsr { index: 0x10 };
        assert_eq!(
            handle(&devices, read, &mut []),
            (Flow::Continue, Some(Answer::InjectGp))
        );
        let debug = Exit::Debug {
            rip: 0,
            exception: 1,
        };
        assert!(matches!(
            handle(&devices, debug, &mut []).0,
            Flow::End(End::Unhandled(_))
        ));
    }
}
