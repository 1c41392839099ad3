//! INIT_VM and FINALIZE_VM.

use kvm_ops::tdx::status::{Class, CompletionStatus};
use kvm_ops::{CpuidEntry, Error, Gpaw, TdParams};
use kvm_ops_uapi::checks::{tdx_finalize_vm, tdx_init_vm};
use kvm_ops_uapi::system::{CPUID_FLAG_SIGNIFICANT_INDEX, CpuidEntry2};
use kvm_ops_uapi::tdx::{MAX_CPUID_ENTRIES, TdxInitVm};
use kvm_ops_uapi::{Errno, U32};

use super::command::Call;
use super::engine::{Engine, Failed};
use super::limits::{ADDRESSES, Limits, is_unsupported, width, with_width};
use crate::arg;
use crate::irq::Irq;
use crate::refusal::{Result, ensure};
use crate::vm::State;

/// The unit of a TD's TSC frequency, in kHz.
const TSC_UNIT: u32 = 25_000;

/// The module's status for a measurement that closes before there is a vCPU.
const NO_VCPUS: u64 = 0xc000_0609_0000_0000;

/// The structure and its list. Checks 2 to 7.
fn read(call: &Call<'_>) -> Result<(TdxInitVm, Vec<CpuidEntry2>)> {
    use tdx_init_vm::{COPY, COUNT, FLAGS, NENT, PADDING, RESERVED};
    const NENT_AT: u64 = std::mem::offset_of!(TdxInitVm, nent) as u64;
    ensure(call.flags == 0, FLAGS)?;
    let nent: U32 = arg::read(call.process, call.data.wrapping_add(NENT_AT), NENT)?;
    ensure(nent.get() <= MAX_CPUID_ENTRIES, COUNT)?;
    let head: TdxInitVm = arg::read(call.process, call.data, COPY)?;
    let at = call.data.wrapping_add(size_of::<TdxInitVm>() as u64);
    let entries = arg::read_list(call.process, at, nent.get() as usize, COPY)?;
    ensure(head.reserved.iter().all(|word| word.get() == 0), RESERVED)?;
    ensure(head.padding.get() == 0 && head.nent == nent, PADDING)?;
    Ok((head, entries))
}

/// The first entry for a leaf and sub-leaf. One that does not say that its index counts is for any.
fn find(entries: &[CpuidEntry2], leaf: u32, subleaf: u32) -> Option<&CpuidEntry2> {
    entries.iter().find(|entry| {
        let counts = entry.flags.get() & CPUID_FLAG_SIGNIFICANT_INDEX != 0;
        entry.function.get() == leaf && (!counts || entry.index.get() == subleaf)
    })
}

/// Check 11: the width of guest-physical addresses.
fn address_width(entries: &[CpuidEntry2], limits: &Limits) -> Result<Gpaw> {
    use tdx_init_vm::WIDTH;
    let entry = find(entries, ADDRESSES, 0).ok_or(WIDTH)?;
    match width(entry.eax.get()) {
        48 => Ok(Gpaw::Bits48),
        52 if limits.wide => Ok(Gpaw::Bits52),
        _ => Err(WIDTH.into()),
    }
}

/// Check 12: the values of configurable leaves, and no entry beside them.
fn configured(entries: &[CpuidEntry2], limits: &Limits) -> Result<Vec<CpuidEntry>> {
    use tdx_init_vm::LEAVES;
    let mut values = Vec::new();
    for row in &limits.rows {
        let Some(entry) = find(entries, row.leaf, row.subleaf.unwrap_or(0)) else {
            continue;
        };
        ensure(!is_unsupported(entry), LEAVES)?;
        let eax = match row.leaf {
            // The module takes the width by another field.
            ADDRESSES => with_width(entry.eax.get(), 0),
            _ => entry.eax.get(),
        };
        values.push(CpuidEntry {
            leaf: row.leaf,
            subleaf: row.subleaf.unwrap_or(0),
            subleaf_significant: row.subleaf.is_some(),
            regs: [eax, entry.ebx.get(), entry.ecx.get(), entry.edx.get()],
        });
    }
    ensure(values.len() == entries.len(), LEAVES)?;
    Ok(values)
}

/// Checks 9 to 12.
fn params(
    head: &TdxInitVm,
    entries: &[CpuidEntry2],
    limits: &Limits,
    tsc_khz: u32,
) -> Result<TdParams> {
    use tdx_init_vm::{ATTRIBUTES, XFAM};
    let ((attributes, always), (xfam, always_states)) = (limits.attributes, limits.xfam);
    ensure(head.attributes.get() & !attributes == 0, ATTRIBUTES)?;
    ensure(head.xfam.get() & !xfam == 0, XFAM)?;
    Ok(TdParams {
        attributes: head.attributes.get() | always,
        xfam: head.xfam.get() | always_states,
        gpaw: address_width(entries, limits)?,
        tsc_khz: tsc_khz / TSC_UNIT * TSC_UNIT,
        mrconfigid: head.mrconfigid,
        mrowner: head.mrowner,
        mrownerconfig: head.mrownerconfig,
        cpuid: configured(entries, limits)?,
        ..TdParams::default()
    })
}

/// INIT_VM. After a failure the VM may be tried again, unless the module failed in a way that KVM takes for a
/// bug: then the VM is dead.
pub(super) fn init_vm(state: &mut State, limits: &Limits, call: &Call<'_>) -> Result<(), Failed> {
    use tdx_init_vm::{KEY_ID, MEMORY, NO_VCPU, ONCE};
    ensure(state.td.engine.is_none(), ONCE)?;
    let (head, entries) = read(call)?;
    ensure(state.vcpus.is_empty(), NO_VCPU)?;
    let params = params(&head, &entries, limits, state.tsc_khz())?;
    let engine = Engine::new(call.vm.kernel().host(), params, call.vm.max_vcpus());
    let engine = engine.map_err(|failed| {
        let status = failed
            .diagnosis
            .as_ref()
            .and_then(|diagnosis| diagnosis.call);
        let hw_error = status.map_or(0, |call| call.status);
        let refusal = match failed.error {
            Error::NoKeyId => KEY_ID.into(),
            Error::NoMemory => MEMORY.into(),
            Error::Firmware(word)
                if CompletionStatus::new(word).class() == Class::OPERAND_INVALID =>
            {
                Errno::EINVAL.into()
            }
            error => {
                if Errno(error.errno()) == Errno::EIO {
                    call.vm.die();
                }
                crate::Refusal::from(error)
            }
        };
        Failed { refusal, hw_error }
    })?;
    call.vm.kernel().faults().allocate(MEMORY)?;
    if let Some(wires) = engine.wires() {
        Irq::attach(&state.irq, wires);
    }
    state.td.engine = Some(engine);
    Ok(state.show_slots()?)
}

/// FINALIZE_VM.
pub(super) fn finalize(state: &mut State, call: &Call<'_>) -> Result<(), Failed> {
    use tdx_finalize_vm::STATE;
    ensure(state.td.is_building(), STATE)?;
    let td = &mut state.td;
    let Some(engine) = &mut td.engine else {
        return Err(STATE.into());
    };
    let done = match engine.vm.finalize() {
        // The back end knows without asking, the kernel asks.
        Err(Error::Invalid(kvm_ops::Field::VcpuCount, _)) => Err(Failed {
            refusal: Errno::EIO.into(),
            hw_error: NO_VCPUS,
        }),
        done => done.map_err(|error| engine.failed(error)),
    };
    if let Err(failed) = done {
        if failed.refusal.errno() == Errno::EIO {
            call.vm.die();
        }
        return Err(failed);
    }
    td.finalized = true;
    Ok(())
}
