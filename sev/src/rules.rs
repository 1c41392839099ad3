//! The commands that a VM takes in its present state, with the errno of Linux 7.1 for the others
//! (`sev_mem_enc_ioctl` and the functions that it calls).

use kvm_ops::{Call, Error, Field, Result, Tech};

/// "Not a typewriter": the VM is not of the kind that the command needs.
pub(crate) const ENOTTY: i32 = 25;
/// The command is another technology's.
pub(crate) const EPERM: i32 = 1;
/// A structure or blob that is not there.
pub(crate) const EFAULT: i32 = 14;
/// No ASID.
pub(crate) const EBUSY: i32 = 16;
/// A page could not be added.
pub(crate) const EIO: i32 = 5;
/// A bad argument, or not the VM's to ask.
pub(crate) const EINVAL: i32 = 22;

/// An errno of the call without a named error.
pub(crate) const fn errno(number: i32) -> Error {
    Error::Sys(Call::MemoryEncryptOp, number)
}

/// The holder of the encryption context.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Holding {
    /// The VM itself.
    Owner,
    /// Another VM, whose mirror this one is.
    Mirror,
    /// The VM itself until its token is traded, and the receiving VM afterwards.
    Staged,
}

/// The input of a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct View {
    /// The technology.
    pub tech: Tech,
    /// The VM has an encryption context: `KVM_SEV_INIT2` succeeded.
    pub active: bool,
    /// Its holder.
    pub holding: Holding,
}

/// The kind of VM that a command needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Needs {
    /// One that is not initialised.
    NoContext,
    /// Any that is.
    Sev,
    /// SEV-ES or SNP.
    SevEs,
    /// SNP.
    Snp,
    /// No VM of this library: a VM of the default type.
    DefaultVm,
    /// No VM at all: the kernel does not implement it.
    Nothing,
}

/// A command of `KVM_MEMORY_ENCRYPT_OP`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Its number.
    pub id: u32,
    /// Its name after `KVM_SEV_`.
    pub name: &'static str,
    /// The kind of VM that it needs.
    pub needs: Needs,
    /// The errno for a VM of another kind, which differs between commands in the kernel.
    pub otherwise: i32,
}

const fn rule(id: u32, name: &'static str, needs: Needs, otherwise: i32) -> Rule {
    Rule {
        id,
        name,
        needs,
        otherwise,
    }
}

/// Every command of the kernel's header, by number. Other numbers are refused with EINVAL.
pub const RULES: &[Rule] = &[
    rule(0, "INIT", Needs::DefaultVm, EINVAL),
    rule(1, "ES_INIT", Needs::DefaultVm, EINVAL),
    rule(2, "LAUNCH_START", Needs::Sev, ENOTTY),
    rule(3, "LAUNCH_UPDATE_DATA", Needs::Sev, ENOTTY),
    rule(4, "LAUNCH_UPDATE_VMSA", Needs::SevEs, ENOTTY),
    rule(5, "LAUNCH_SECRET", Needs::Sev, ENOTTY),
    rule(6, "LAUNCH_MEASURE", Needs::Sev, ENOTTY),
    rule(7, "LAUNCH_FINISH", Needs::Sev, ENOTTY),
    rule(8, "SEND_START", Needs::Sev, ENOTTY),
    rule(9, "SEND_UPDATE_DATA", Needs::Sev, ENOTTY),
    rule(10, "SEND_UPDATE_VMSA", Needs::Nothing, EINVAL),
    rule(11, "SEND_FINISH", Needs::Sev, ENOTTY),
    rule(12, "RECEIVE_START", Needs::Sev, ENOTTY),
    rule(13, "RECEIVE_UPDATE_DATA", Needs::Sev, EINVAL),
    rule(14, "RECEIVE_UPDATE_VMSA", Needs::Nothing, EINVAL),
    rule(15, "RECEIVE_FINISH", Needs::Sev, ENOTTY),
    rule(16, "GUEST_STATUS", Needs::Sev, ENOTTY),
    rule(17, "DBG_DECRYPT", Needs::Sev, ENOTTY),
    rule(18, "DBG_ENCRYPT", Needs::Sev, ENOTTY),
    rule(19, "CERT_EXPORT", Needs::Nothing, EINVAL),
    rule(20, "GET_ATTESTATION_REPORT", Needs::Sev, ENOTTY),
    rule(21, "SEND_CANCEL", Needs::Sev, ENOTTY),
    rule(22, "INIT2", Needs::NoContext, EINVAL),
    rule(100, "SNP_LAUNCH_START", Needs::Snp, ENOTTY),
    rule(101, "SNP_LAUNCH_UPDATE", Needs::Snp, EINVAL),
    rule(102, "SNP_LAUNCH_FINISH", Needs::Snp, ENOTTY),
    rule(103, "SNP_ENABLE_REQ_CERTS", Needs::Snp, EINVAL),
];

/// The first number of SNP's own commands.
const FIRST_SNP: u32 = 100;

/// The commands of a VM whose context is staged: debug commands, with numbers by technology. SNP has
/// none in the kernel's interface, and is never staged.
const fn debug_commands(tech: Tech) -> &'static [u32] {
    match tech {
        Tech::Sev | Tech::SevEs => &[17, 18],
        _ => &[],
    }
}

/// The commands of a mirror, none of which changes the context.
pub(crate) const MIRROR_COMMANDS: [u32; 4] = [4, 16, 17, 18];

/// Decides whether a VM takes a command now. The state of the guest's launch is for firmware to
/// check.
///
/// # Errors
/// With the errno that Linux gives: in its order, a mirror's EINVAL, then EPERM for a staged context
/// and for SNP, then the kind of VM.
pub fn allowed(id: u32, view: &View) -> Result<&'static Rule> {
    if view.holding == Holding::Mirror && !MIRROR_COMMANDS.contains(&id) {
        return Err(errno(EINVAL));
    }
    if view.holding == Holding::Staged && !debug_commands(view.tech).contains(&id) {
        return Err(errno(EPERM));
    }
    if view.active && view.tech == Tech::SevSnp && id < FIRST_SNP {
        return Err(errno(EPERM));
    }
    let Some(rule) = RULES.iter().find(|rule| rule.id == id) else {
        return Err(Error::Invalid(Field::Command, id.into()));
    };
    let fits = match rule.needs {
        Needs::NoContext => !view.active,
        Needs::Sev => view.active,
        Needs::SevEs => view.active && view.tech != Tech::Sev,
        Needs::Snp => view.active && view.tech == Tech::SevSnp,
        Needs::DefaultVm | Needs::Nothing => false,
    };
    if fits {
        Ok(rule)
    } else {
        Err(errno(rule.otherwise))
    }
}

/// Checks that regions may be registered now.
pub(crate) fn region_allowed(view: &View) -> Result<()> {
    if !view.active {
        return Err(errno(ENOTTY));
    }
    match view.holding {
        Holding::Owner => Ok(()),
        Holding::Mirror => Err(errno(EINVAL)),
        Holding::Staged => Err(errno(EPERM)),
    }
}

/// SEV_FEATURES that a VM may ask for: DEBUG_SWAP (bit 5), where register state is encrypted. The
/// bit that says SNP is added here, not asked for.
pub const fn supported_features(tech: Tech) -> u64 {
    match tech {
        Tech::SevEs | Tech::SevSnp => 1 << 5,
        _ => 0,
    }
}

/// Checks SEV_FEATURES.
pub(crate) fn check_features(tech: Tech, features: u64) -> Result<()> {
    match features & !supported_features(tech) {
        0 => Ok(()),
        bits => Err(Error::Invalid(Field::Flags, bits)),
    }
}

/// Checks the GHCB protocol version of a VM's parameters. Plain SEV has no GHCB and ignores it.
pub(crate) fn check_ghcb(tech: Tech, version: u16) -> Result<()> {
    match (tech, version) {
        (Tech::Sev, _) | (_, 0 | 2) | (Tech::SevEs, 1) => Ok(()),
        _ => Err(Error::Invalid(Field::Flags, version.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TECHS: [Tech; 3] = [Tech::Sev, Tech::SevEs, Tech::SevSnp];

    fn code(id: u32, view: &View) -> i32 {
        allowed(id, view).map_or_else(|error| error.errno(), |_| 0)
    }

    #[test]
    fn a_mirror_may_ask_four_commands_and_is_refused_first() {
        for tech in TECHS {
            let view = View {
                tech,
                active: true,
                holding: Holding::Mirror,
            };
            for id in (0..200).filter(|id| !MIRROR_COMMANDS.contains(id)) {
                assert_eq!(code(id, &view), EINVAL, "{tech} {id}");
            }
        }
        let mirror = View {
            tech: Tech::SevEs,
            active: true,
            holding: Holding::Mirror,
        };
        assert!(MIRROR_COMMANDS.iter().all(|id| code(*id, &mirror) == 0));
    }

    #[test]
    fn every_command_on_every_kind_of_vm_is_allowed_or_has_the_kernels_errno() {
        for tech in TECHS {
            for active in [false, true] {
                let view = View {
                    tech,
                    active,
                    holding: Holding::Owner,
                };
                for id in 0..300 {
                    let expected = match (id, active, tech) {
                        (0..=99, true, Tech::SevSnp) => EPERM,
                        (100 | 102, true, Tech::SevSnp) => 0,
                        (101 | 103, true, Tech::SevSnp) => 0,
                        (100 | 102, ..) => ENOTTY,
                        (101 | 103, ..) => EINVAL,
                        (22, false, _) => 0,
                        (22, true, _) => EINVAL,
                        (0 | 1 | 10 | 14 | 19, ..) => EINVAL,
                        (4, true, Tech::SevEs) => 0,
                        (4, ..) => ENOTTY,
                        (13, false, _) => EINVAL,
                        (2..=21, true, _) => 0,
                        (2..=21, false, _) => ENOTTY,
                        _ => EINVAL,
                    };
                    assert_eq!(code(id, &view), expected, "{tech} active {active} {id}");
                }
            }
        }
    }

    #[test]
    fn rules_are_sorted_by_number_without_repetition() {
        assert!(RULES.windows(2).all(|pair| pair[0].id < pair[1].id));
    }
}
