//! Model-specific registers in lists (`KVM_GET_MSRS`, `KVM_SET_MSRS`).

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use kvm_ops::{Call, Error, Field, Msr, Result};

use crate::error::sys;

/// The most entries of one call: MAX_IO_MSRS of Linux `arch/x86/kvm/x86.c`, which is refused itself.
const MOST: usize = 255;

fn list(msrs: &[Msr]) -> Result<Msrs> {
    let entries: Vec<kvm_msr_entry> = msrs
        .iter()
        .map(|msr| kvm_msr_entry {
            index: msr.index,
            data: msr.value,
            ..Default::default()
        })
        .collect();
    Msrs::from_entries(&entries).map_err(|_| Error::NoMemory)
}

/// KVM stops at the first entry that it refuses, and returns how many it did.
fn check(msrs: &[Msr], done: usize) -> Result<()> {
    match msrs.get(done) {
        None => Ok(()),
        Some(msr) => Err(Error::Invalid(Field::Msr, msr.index.into())),
    }
}

pub(crate) fn get(vcpu: &VcpuFd, msrs: &mut [Msr]) -> Result<()> {
    for part in msrs.chunks_mut(MOST) {
        let mut kvm = list(part)?;
        let done = vcpu.get_msrs(&mut kvm).map_err(sys(Call::Msrs))?;
        for (msr, entry) in part.iter_mut().zip(kvm.as_slice()).take(done) {
            msr.value = entry.data;
        }
        check(part, done)?;
    }
    Ok(())
}

pub(crate) fn set(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<()> {
    for part in msrs.chunks(MOST) {
        let done = vcpu.set_msrs(&list(part)?).map_err(sys(Call::Msrs))?;
        check(part, done)?;
    }
    Ok(())
}

/// The MSRs of the list that the vCPU has: KVM lists more than it gives to each vCPU.
pub(crate) fn get_present(vcpu: &VcpuFd, indexes: impl Iterator<Item = u32>) -> Result<Vec<Msr>> {
    let mut msrs: Vec<Msr> = indexes.map(Msr::read).collect();
    let mut start = 0;
    loop {
        match get(vcpu, &mut msrs[start..]) {
            Ok(()) => return Ok(msrs),
            Err(Error::Invalid(Field::Msr, index)) => {
                let absent = msrs[start..]
                    .iter()
                    .position(|m| u64::from(m.index) == index);
                start += absent.unwrap_or(0);
                msrs.remove(start);
            }
            Err(error) => return Err(error),
        }
    }
}
