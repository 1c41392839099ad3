//! The devices that the images look for, besides those of every machine.

use std::sync::{Mutex, PoisonError};

use kvm_ops::Exit;
use kvm_ops_machine::{Devices, ExitContext, ExitHandler, Flow};

/// Ports of QEMU's fw_cfg: the selector, and its bytes one after the other.
const FW_CFG_SELECTOR: u16 = 0x510;
const FW_CFG_DATA: u16 = 0x511;
/// Its entries: bytes of RAM, and processors.
const RAM_SIZE: u16 = 3;
const PROCESSORS: u16 = 5;

/// Ports of QEMU's pc-testdev: a register that reads back, and from `LINES` on one for each interrupt
/// line. (What flushes a page of the host, 0xe4, has nothing to do here.)
const REGISTER: u16 = 0xe0;
const LINES: u16 = 0x2000;
const LINES_LAST: u16 = LINES + 23;
/// Its memory, which is read and written by exits.
const MEMORY: u64 = 0xff00_0000;
const MEMORY_BYTES: usize = 64 << 10;

/// The devices of one run.
pub(crate) struct TestDevices {
    base: Devices,
    ram: u64,
    vcpus: u32,
    state: Mutex<State>,
}

struct State {
    /// Bytes of the selected entry that are left.
    fw_cfg: Vec<u8>,
    register: [u8; 4],
    memory: Vec<u8>,
}

impl TestDevices {
    pub(crate) fn new(base: Devices, ram: u64, vcpus: u32) -> Self {
        let state = State {
            fw_cfg: Vec::new(),
            register: [0; 4],
            memory: vec![0; MEMORY_BYTES],
        };
        Self {
            base,
            ram,
            vcpus,
            state: Mutex::new(state),
        }
    }

    fn select(&self, selector: u16) -> Vec<u8> {
        match selector {
            RAM_SIZE => self.ram.to_le_bytes().into(),
            PROCESSORS => (self.vcpus as u16).to_le_bytes().into(),
            _ => Vec::new(),
        }
    }

    /// True if the exit is these devices'.
    fn answer(&self, context: &mut ExitContext<'_>) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match context.exit() {
            Exit::IoOut { port, .. } => match port {
                FW_CFG_SELECTOR => {
                    let data = context.data();
                    let low = data.first().copied().unwrap_or(0);
                    let high = data.get(1).copied().unwrap_or(0);
                    state.fw_cfg = self.select(u16::from_le_bytes([low, high]));
                }
                REGISTER => {
                    let data = context.data();
                    state.register[..data.len().min(4)].copy_from_slice(data);
                }
                LINES..=LINES_LAST => {
                    let high = context.data().first() != Some(&0);
                    let line = u32::from(port - LINES);
                    drop(state);
                    let set = context.machine().set_irq_line(line, high);
                    set.expect("every line leads to the I/O APIC");
                }
                _ => return false,
            },
            Exit::IoIn { port, size, .. } => match port {
                FW_CFG_DATA => {
                    for byte in context.data() {
                        *byte = match state.fw_cfg.is_empty() {
                            true => 0,
                            false => state.fw_cfg.remove(0),
                        };
                    }
                }
                REGISTER => {
                    // A repeated INS reads many items at once.
                    for item in context.data().chunks_mut(size.into()) {
                        let bytes = item.len().min(4);
                        item[..bytes].copy_from_slice(&state.register[..bytes]);
                    }
                }
                _ => return false,
            },
            Exit::MmioRead { gpa, len } | Exit::MmioWrite { gpa, len } => {
                let at = gpa.get().checked_sub(MEMORY).unwrap_or(u64::MAX) as usize;
                let end = at.saturating_add(len.into());
                let Some(memory) = state.memory.get_mut(at..end) else {
                    return false;
                };
                match context.exit() {
                    Exit::MmioRead { .. } => context.data().copy_from_slice(memory),
                    _ => memory.copy_from_slice(context.data()),
                }
            }
            _ => return false,
        }
        true
    }
}

impl ExitHandler for TestDevices {
    fn handle(&self, context: &mut ExitContext<'_>) -> Flow {
        match self.answer(context) {
            true => Flow::Continue,
            false => self.base.handle(context),
        }
    }
}
