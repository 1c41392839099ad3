//! INIT, ES_INIT and INIT2.

use kvm_ops::{SevParams, Tech};
use kvm_ops_uapi::Errno;
use kvm_ops_uapi::checks::{es_init, init, init_any, init2};
use kvm_ops_uapi::sev::SevInit;
use kvm_ops_uapi::system::vm_type;

use super::VMSA_FEATURES;
use super::command::{Answer, Call, Sent};
use super::engine::{Engine, Failed};
use crate::arg;
use crate::refusal::{Result, ensure};
use crate::vm::State;

pub(super) fn init(state: &mut State, call: &Call<'_>) -> Answer {
    ensure(call.vm.kind() == vm_type::DEFAULT, init::TYPE)?;
    initialise(state, call, Tech::Sev, &SevInit::default(), 0)
}

pub(super) fn es_init(state: &mut State, call: &Call<'_>) -> Answer {
    ensure(call.vm.kernel().has_type(vm_type::SEV_ES), es_init::ENABLED)?;
    ensure(call.vm.kind() == vm_type::DEFAULT, es_init::TYPE)?;
    // The first version of the GHCB protocol, the only one when the command was made.
    initialise(state, call, Tech::SevEs, &SevInit::default(), 1)
}

pub(super) fn init2(state: &mut State, call: &Call<'_>) -> Answer {
    ensure(!state.sev.is_active(), init2::ONCE)?;
    let tech = match call.vm.kind() {
        vm_type::SEV => Tech::Sev,
        vm_type::SEV_ES => Tech::SevEs,
        vm_type::SNP => Tech::SevSnp,
        _ => return Err(init2::TYPE.into()),
    };
    let args: SevInit = arg::read(call.process, call.data, init2::COPY)?;
    let default_version = if tech == Tech::Sev { 0 } else { 2 };
    initialise(state, call, tech, &args, default_version)
}

fn check(state: &State, tech: Tech, args: &SevInit) -> Result<()> {
    use init_any::{FEATURES, FLAGS, GHCB, NO_VCPU, ONCE, SNP_GHCB};
    ensure(state.vcpus.is_empty(), NO_VCPU)?;
    ensure(args.flags.get() == 0, FLAGS)?;
    let features = if tech == Tech::Sev { 0 } else { VMSA_FEATURES };
    ensure(args.vmsa_features.get() & !features == 0, FEATURES)?;
    let version = args.ghcb_version.get();
    ensure(version <= 2 && (tech != Tech::Sev || version == 0), GHCB)?;
    ensure(tech != Tech::SevSnp || version != 1, SNP_GHCB)?;
    ensure(!state.sev.is_active(), ONCE)
}

fn initialise(
    state: &mut State,
    call: &Call<'_>,
    tech: Tech,
    args: &SevInit,
    version: u16,
) -> Answer {
    check(state, tech, args)?;
    let number = match tech {
        Tech::Sev => vm_type::SEV,
        Tech::SevEs => vm_type::SEV_ES,
        _ => vm_type::SNP,
    };
    ensure(call.vm.kernel().has_type(number), init_any::RANGE)?;
    let params = SevParams {
        vmsa_features: args.vmsa_features.get(),
        ghcb_version: match args.ghcb_version.get() {
            0 => version,
            given => given,
        },
        ..SevParams::default()
    };
    let host = call.vm.kernel().host();
    host.initialise_sev_platform().map_err(|status| Failed {
        refusal: Errno::EIO.into(),
        status: Some(status.0.into()),
    })?;
    let irqchip = state.irqchip();
    let engine = Engine::new(host, tech, params, irqchip, &state.irq);
    let engine = engine.map_err(|error| match error {
        kvm_ops::Error::NoKeyId => init_any::ASID.into(),
        kvm_ops::Error::NoMemory => init_any::MEMORY.into(),
        error => crate::Refusal::from(error),
    })?;
    call.vm.kernel().faults().allocate(init_any::MEMORY)?;
    state.sev.engine = Some(engine);
    state
        .show_slots()
        .inspect_err(|_| state.sev.engine = None)?;
    state.sev.initialised_here = true;
    Ok(Sent::No)
}
