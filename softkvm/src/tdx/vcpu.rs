//! INIT_VCPU and GET_CPUID.

use std::sync::{Arc, Mutex};

use kvm_ops::tdx::VcpuStart;
use kvm_ops_uapi::checks::{tdx_get_cpuid, tdx_init_vcpu};
use kvm_ops_uapi::system::{Cpuid2, CpuidEntry2, MAX_CPUID_ENTRIES};
use kvm_ops_uapi::{Errno, U32};

use super::command::Call;
use super::engine::Engine;
use super::limits::{ADDRESSES, entry, with_width};
use crate::arg;
use crate::refusal::{Result, ensure};
use crate::vcpu::{State as VcpuState, Vcpu};
use crate::vm::State;

/// INIT_VCPU: the module gets the vCPU here, and not when its file was made.
pub(super) fn init(
    state: &mut State,
    (file, vcpu): (&Vcpu, &mut VcpuState),
    call: &Call<'_>,
) -> Result<()> {
    use tdx_init_vcpu::{FLAGS, MEMORY, ONCE, X2APIC};
    ensure(call.flags == 0, FLAGS)?;
    let id = file.id();
    ensure(!state.td.has_vcpu(id), ONCE)?;
    ensure(vcpu.has_x2apic(), X2APIC)?;
    call.vm.kernel().faults().allocate(MEMORY)?;
    let td = &mut state.td;
    let engine = td.engine.as_ref().ok_or(Errno::EINVAL)?;
    let start = VcpuStart {
        rcx: call.data,
        x2apic_id: id,
    };
    // The back end counts vCPUs; numbers may have gaps.
    let made = engine.create_vcpu(td.vcpus.len() as u32, start, Arc::clone(file.run_area()));
    let made = made.map_err(|error| match error {
        kvm_ops::Error::NoMemory => MEMORY.into(),
        error => engine.failed(error).refusal,
    })?;
    td.vcpus.insert(id, Arc::new(Mutex::new(made)));
    vcpu.start()
}

/// The values of a leaf: of the leaf if it has no sub-leaves, else of each up to the first that the module has
/// none for.
fn leaf(engine: &Engine, leaf: u32, list: &mut Vec<CpuidEntry2>) -> Result<()> {
    /// Sub-leaves that the module's names have room for.
    const SUBLEAVES: u32 = 0x80;
    if let Some(values) = engine.cpuid(leaf, None)? {
        list.push(entry((leaf, None), values));
        return Ok(());
    }
    for subleaf in 0..SUBLEAVES {
        match engine.cpuid(leaf, Some(subleaf))? {
            Some(values) => list.push(entry((leaf, Some(subleaf)), values)),
            None => break,
        }
    }
    Ok(())
}

/// All values from a basic leaf on, which says how many there are.
fn leaves_from(engine: &Engine, first: u32, list: &mut Vec<CpuidEntry2>) -> Result<()> {
    /// Leaves that the module's names have room for.
    const LEAVES: u32 = 0x7f;
    let known = list.len();
    leaf(engine, first, list)?;
    let last = list.get(known).map_or(first, |entry| entry.eax.get());
    for number in first + 1..=last.clamp(first, first + LEAVES) {
        leaf(engine, number, list)?;
    }
    Ok(())
}

/// GET_CPUID. The number of entries is written also if there is no room for them.
pub(super) fn get_cpuid(state: &State, call: &Call<'_>) -> Result<()> {
    use tdx_get_cpuid::{COPY, COPY_BACK, ROOM};
    let mut head: Cpuid2 = arg::read(call.process, call.data, COPY)?;
    let engine = state.td.engine.as_ref().ok_or(Errno::EINVAL)?;
    let mut list = Vec::new();
    leaves_from(engine, 0, &mut list)?;
    leaves_from(engine, 1 << 31, &mut list)?;
    list.truncate(MAX_CPUID_ENTRIES as usize);
    for entry in list
        .iter_mut()
        .filter(|entry| entry.function.get() == ADDRESSES)
    {
        // The shared bit is the highest one.
        let bits = engine.shared_bit().ilog2() + 1;
        entry.eax = U32::new(with_width(entry.eax.get(), bits));
    }
    let room = head.nent.get() as usize;
    head.nent = U32::new(list.len() as u32);
    arg::write(call.process, call.data, &head, COPY_BACK)?;
    ensure(room >= list.len(), ROOM)?;
    let at = call.data.wrapping_add(size_of::<Cpuid2>() as u64);
    arg::write(call.process, at, &list[..], COPY_BACK)
}
