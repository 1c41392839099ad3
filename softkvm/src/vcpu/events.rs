//! Events that wait, as the interface has them and as back ends have them.

use kvm_ops::{Delivery, Events, Exception, Interrupt, InterruptShadow, Nmi, Smi};
use kvm_ops_uapi::state::{VcpuEvents, event_flags as flags, shadow};
use kvm_ops_uapi::{Errno, U32, U64};

use crate::refusal::Result;

/// The parts of the structure that a VM has switched on.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Parts {
    /// `KVM_CAP_EXCEPTION_PAYLOAD`.
    pub(crate) payload: bool,
    /// `KVM_CAP_X86_TRIPLE_FAULT_EVENT`.
    pub(crate) triple_fault: bool,
}

/// Flags that every VM takes.
const ALWAYS: u32 = flags::NMI_PENDING | flags::SIPI_VECTOR | flags::SHADOW | flags::SMM;

impl Parts {
    fn flags(self) -> u32 {
        let payload = if self.payload { flags::PAYLOAD } else { 0 };
        let triple = if self.triple_fault {
            flags::TRIPLE_FAULT
        } else {
            0
        };
        ALWAYS | payload | triple
    }
}

pub(super) fn to_uapi(from: &Events, parts: Parts) -> VcpuEvents {
    let mut to = VcpuEvents {
        flags: U32::new(parts.flags() & !flags::SIPI_VECTOR),
        ..VcpuEvents::default()
    };
    if let Some(exception) = &from.exception {
        let pending = parts.payload && exception.delivery == Delivery::Pending;
        to.exception_pending = pending.into();
        to.exception_injected = (!pending).into();
        to.exception_nr = exception.vector;
        to.exception_has_error_code = exception.error.is_some().into();
        to.exception_error_code = U32::new(exception.error.unwrap_or(0));
        if parts.payload {
            to.exception_has_payload = exception.payload.is_some().into();
            to.exception_payload = U64::new(exception.payload.unwrap_or(0));
        }
    }
    if let Some(interrupt) = &from.interrupt {
        to.interrupt_injected = 1;
        to.interrupt_nr = interrupt.vector;
        to.interrupt_soft = interrupt.soft.into();
    }
    let bit = |set: bool, bit: u8| if set { bit } else { 0 };
    to.interrupt_shadow =
        bit(from.shadow.mov_ss, shadow::MOV_SS) | bit(from.shadow.sti, shadow::STI);
    to.nmi_injected = from.nmi.injected.into();
    to.nmi_pending = from.nmi.pending.into();
    to.nmi_masked = from.nmi.masked.into();
    to.triple_fault_pending = (parts.triple_fault && from.triple_fault).into();
    to
}

/// What was set, over what there is: parts whose flag is clear stay.
///
/// # Errors
/// EINVAL for unknown flags, for exceptions that there are not, and for system-management mode, which
/// the processors do not have.
pub(super) fn from_uapi(from: &VcpuEvents, parts: Parts, old: &Events) -> Result<Events> {
    let given = from.flags.get();
    let has = |flag: u32| given & flag != 0;
    let pending = has(flags::PAYLOAD) && from.exception_pending != 0;
    let injected = from.exception_injected != 0;
    let smm = [
        from.smi_smm,
        from.smi_pending,
        from.smi_inside_nmi,
        from.smi_latched_init,
    ];
    let known = given & !parts.flags() == 0
        && !(pending && injected)
        && (!(pending || injected) || from.exception_nr <= 31 && from.exception_nr != 2)
        && !(has(flags::SMM) && smm != [0; 4]);
    if !known {
        return Err(Errno::EINVAL.into());
    }
    let delivery = if pending {
        Delivery::Pending
    } else {
        Delivery::Injected
    };
    let payload = has(flags::PAYLOAD) && from.exception_has_payload != 0;
    Ok(Events {
        exception: (pending || injected).then_some(Exception {
            vector: from.exception_nr,
            error: (from.exception_has_error_code != 0).then_some(from.exception_error_code.get()),
            payload: payload.then_some(from.exception_payload.get()),
            delivery,
        }),
        interrupt: (from.interrupt_injected != 0).then_some(Interrupt {
            vector: from.interrupt_nr,
            soft: from.interrupt_soft != 0,
        }),
        shadow: if has(flags::SHADOW) {
            InterruptShadow {
                mov_ss: from.interrupt_shadow & shadow::MOV_SS != 0,
                sti: from.interrupt_shadow & shadow::STI != 0,
            }
        } else {
            old.shadow
        },
        nmi: Nmi {
            injected: from.nmi_injected != 0,
            pending: if has(flags::NMI_PENDING) {
                from.nmi_pending != 0
            } else {
                old.nmi.pending
            },
            masked: from.nmi_masked != 0,
        },
        // A start-up vector is kept by KVM and used by nothing until the vCPU gets INIT.
        sipi_vector: None,
        smi: Smi::default(),
        triple_fault: if has(flags::TRIPLE_FAULT) {
            from.triple_fault_pending != 0
        } else {
            old.triple_fault
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Parts = Parts {
        payload: true,
        triple_fault: true,
    };

    fn events() -> Events {
        Events {
            exception: Some(Exception {
                payload: Some(0x1000),
                ..Exception::new(14, Some(2))
            }),
            interrupt: Some(Interrupt {
                vector: 0x41,
                soft: false,
            }),
            shadow: InterruptShadow {
                mov_ss: true,
                sti: false,
            },
            nmi: Nmi {
                injected: false,
                pending: true,
                masked: true,
            },
            triple_fault: true,
            ..Events::default()
        }
    }

    #[test]
    fn events_come_back_as_they_were_set() {
        let there = to_uapi(&events(), ALL);
        let back = from_uapi(&there, ALL, &Events::default()).unwrap();
        assert_eq!(back, events());
    }

    #[test]
    fn parts_without_their_flag_stay_as_they_are() {
        let nothing = VcpuEvents::default();
        let left = from_uapi(&nothing, ALL, &events()).unwrap();
        assert_eq!(left.shadow, events().shadow);
        assert!(left.nmi.pending && left.triple_fault);
        assert_eq!((left.exception, left.interrupt), (None, None));
    }

    #[test]
    fn parts_that_are_not_switched_on_are_refused() {
        for flag in [flags::PAYLOAD, flags::TRIPLE_FAULT, 1 << 6] {
            let given = VcpuEvents {
                flags: U32::new(flag),
                ..VcpuEvents::default()
            };
            let old = Events::default();
            assert!(from_uapi(&given, Parts::default(), &old).is_err());
        }
        assert_eq!(
            to_uapi(&events(), Parts::default()).exception_injected,
            1,
            "without payloads every exception is an injected one"
        );
    }
}
