//! Transfers of the configuration device: a request in the guest's shared memory, and its data there.

use kvm_ops::Gpa;

use super::FwCfg;
use crate::{DeviceMemory, MachineError};

/// Bits of a request's control word. Above them the key of an item to select.
const ERROR: u32 = 1 << 0;
const READ: u32 = 1 << 1;
const SKIP: u32 = 1 << 2;
const SELECT: u32 = 1 << 3;
const WRITE: u32 = 1 << 4;
const KEY_SHIFT: u32 = 16;

/// Bytes that are copied at once: the length is the guest's.
const PIECE: usize = 64 << 10;

/// Serves the request at an address, and answers in its control word: 0, or the error bit.
pub(super) fn transfer(device: &mut FwCfg, request: Gpa, memory: &DeviceMemory<'_>) {
    let mut words = [0; 16];
    if let Err(error) = memory.read(request, &mut words) {
        tracing::warn!(%error, "a request to the configuration device cannot be read");
        return;
    }
    let [control, len, high, low] = words.as_chunks::<4>().0 else {
        return;
    };
    let (control, len) = (u32::from_be_bytes(*control), u32::from_be_bytes(*len));
    let address = u64::from(u32::from_be_bytes(*high)) << 32 | u64::from(u32::from_be_bytes(*low));
    let answer = match serve(device, control, len as usize, Gpa::new(address), memory) {
        Ok(()) => 0,
        Err(error) => {
            tracing::warn!(?error, "a transfer of the configuration device fails");
            ERROR
        }
    };
    if let Err(error) = memory.write(request, &u32::to_be_bytes(answer)) {
        tracing::warn!(%error, "a request to the configuration device cannot be answered");
    }
}

/// The reason why a transfer fails.
#[derive(Debug)]
enum Refused {
    /// No item is the guest's to write.
    ReadOnly,
    #[expect(dead_code, reason = "it is logged")]
    Memory(MachineError),
}

fn serve(
    device: &mut FwCfg,
    control: u32,
    len: usize,
    to: Gpa,
    memory: &DeviceMemory<'_>,
) -> Result<(), Refused> {
    if control & SELECT != 0 {
        device.select((control >> KEY_SHIFT) as u16);
    }
    // The first of these counts.
    if control & READ != 0 {
        memory.check(to, len, true).map_err(Refused::Memory)?;
        copy(device, len, to, memory).map_err(Refused::Memory)
    } else if control & WRITE != 0 {
        Err(Refused::ReadOnly)
    } else {
        if control & SKIP != 0 {
            device.skip(len);
        }
        Ok(())
    }
}

fn copy(
    device: &mut FwCfg,
    len: usize,
    to: Gpa,
    memory: &DeviceMemory<'_>,
) -> Result<(), MachineError> {
    let mut buffer = vec![0; PIECE.min(len)];
    let mut done = 0;
    while done < len {
        let piece = PIECE.min(len - done);
        device.read(&mut buffer[..piece]);
        let beyond = || MachineError::Access {
            gpa: to,
            bytes: len,
        };
        let at = to.checked_add(done as u64).ok_or_else(beyond)?;
        memory.write(at, &buffer[..piece])?;
        done += piece;
    }
    Ok(())
}
