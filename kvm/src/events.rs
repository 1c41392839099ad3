//! Pending and injected events of a vCPU (`struct kvm_vcpu_events`).

use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_VCPUEVENT_VALID_SMM, KVM_VCPUEVENT_VALID_TRIPLE_FAULT,
    KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI, kvm_vcpu_events,
};
use kvm_ops::{
    Delivery, Error, Events, Exception, Field, Interrupt, InterruptShadow, Nmi, Result, Smi,
};

use crate::error::host_lacks;

/// The vector of an NMI, which is no exception.
const NMI: u8 = 2;

/// The optional parts of the structure, which a VM has where KVM offers and it switched them on.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct EventParts {
    /// `KVM_CAP_EXCEPTION_PAYLOAD`: pending exceptions apart from injected ones.
    pub(crate) payload: bool,
    /// `KVM_CAP_X86_TRIPLE_FAULT_EVENT`.
    pub(crate) triple_fault: bool,
}

pub(crate) fn from_kvm(kvm: &kvm_vcpu_events) -> Events {
    let exception = &kvm.exception;
    let delivery = match (exception.injected, exception.pending) {
        (0, 0) => None,
        (0, _) => Some(Delivery::Pending),
        _ => Some(Delivery::Injected),
    };
    let shadow = u32::from(kvm.interrupt.shadow);
    Events {
        exception: delivery.map(|delivery| Exception {
            vector: exception.nr,
            error: (exception.has_error_code != 0).then_some(exception.error_code),
            payload: (kvm.exception_has_payload != 0).then_some(kvm.exception_payload),
            delivery,
        }),
        interrupt: (kvm.interrupt.injected != 0).then_some(Interrupt {
            vector: kvm.interrupt.nr,
            soft: kvm.interrupt.soft != 0,
        }),
        shadow: InterruptShadow {
            mov_ss: shadow & KVM_X86_SHADOW_INT_MOV_SS != 0,
            sti: shadow & KVM_X86_SHADOW_INT_STI != 0,
        },
        nmi: Nmi {
            injected: kvm.nmi.injected != 0,
            pending: kvm.nmi.pending != 0,
            masked: kvm.nmi.masked != 0,
        },
        // KVM never reports it.
        sipi_vector: None,
        smi: Smi {
            smm: kvm.smi.smm != 0,
            pending: kvm.smi.pending != 0,
            inside_nmi: kvm.smi.smm_inside_nmi != 0,
            latched_init: kvm.smi.latched_init != 0,
        },
        triple_fault: kvm.triple_fault.pending != 0,
    }
}

/// # Errors
/// [`Error::Invalid`] for a vector that no exception has; [`Error::HostLacks`] for an event that
/// this KVM would drop.
pub(crate) fn to_kvm(events: &Events, parts: EventParts) -> Result<kvm_vcpu_events> {
    let mut kvm = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING
            | KVM_VCPUEVENT_VALID_SHADOW
            | KVM_VCPUEVENT_VALID_SMM,
        ..Default::default()
    };
    if let Some(exception) = events.exception {
        set_exception(&mut kvm, exception, parts)?;
    }
    if parts.payload {
        kvm.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
    }
    if let Some(interrupt) = events.interrupt {
        kvm.interrupt.injected = 1;
        kvm.interrupt.nr = interrupt.vector;
        kvm.interrupt.soft = interrupt.soft.into();
    }
    let shadow = |set, bit| if set { bit as u8 } else { 0 };
    kvm.interrupt.shadow = shadow(events.shadow.mov_ss, KVM_X86_SHADOW_INT_MOV_SS)
        | shadow(events.shadow.sti, KVM_X86_SHADOW_INT_STI);
    kvm.nmi.injected = events.nmi.injected.into();
    kvm.nmi.pending = events.nmi.pending.into();
    kvm.nmi.masked = events.nmi.masked.into();
    if let Some(vector) = events.sipi_vector {
        kvm.flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR;
        kvm.sipi_vector = vector.into();
    }
    kvm.smi.smm = events.smi.smm.into();
    kvm.smi.pending = events.smi.pending.into();
    kvm.smi.smm_inside_nmi = events.smi.inside_nmi.into();
    kvm.smi.latched_init = events.smi.latched_init.into();
    if parts.triple_fault {
        kvm.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        kvm.triple_fault.pending = events.triple_fault.into();
    } else if events.triple_fault {
        return host_lacks!("KVM_CAP_X86_TRIPLE_FAULT_EVENT");
    }
    Ok(kvm)
}

fn set_exception(kvm: &mut kvm_vcpu_events, exception: Exception, parts: EventParts) -> Result<()> {
    if exception.vector > 31 || exception.vector == NMI {
        return Err(Error::Invalid(Field::Vector, exception.vector.into()));
    }
    kvm.exception.nr = exception.vector;
    kvm.exception.has_error_code = exception.error.is_some().into();
    kvm.exception.error_code = exception.error.unwrap_or(0);
    match exception.delivery {
        Delivery::Pending if parts.payload => kvm.exception.pending = 1,
        // Without the capability KVM ignores `pending`, and both mean that the guest takes it next.
        Delivery::Pending | Delivery::Injected => kvm.exception.injected = 1,
    }
    if let Some(payload) = exception.payload {
        if !parts.payload {
            return host_lacks!("KVM_CAP_EXCEPTION_PAYLOAD");
        }
        kvm.exception_has_payload = 1;
        kvm.exception_payload = payload;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: EventParts = EventParts {
        payload: true,
        triple_fault: true,
    };

    #[test]
    fn each_event_survives_alone() {
        let none = Events::default();
        let injected = Exception {
            delivery: Delivery::Injected,
            ..Exception::new(13, Some(7))
        };
        let page_fault = Exception {
            payload: Some(0x1234),
            ..Exception::new(14, Some(2))
        };
        let shadow = |mov_ss, sti| InterruptShadow { mov_ss, sti };
        #[rustfmt::skip]
        let each = [
            Events { exception: Some(injected), ..none },
            Events { exception: Some(page_fault), ..none },
            Events { interrupt: Some(Interrupt { vector: 0x30, soft: false }), ..none },
            Events { interrupt: Some(Interrupt { vector: 0x80, soft: true }), ..none },
            Events { shadow: shadow(true, false), ..none },
            Events { shadow: shadow(false, true), ..none },
            Events { nmi: Nmi { injected: true, ..none.nmi }, ..none },
            Events { nmi: Nmi { pending: true, ..none.nmi }, ..none },
            Events { nmi: Nmi { masked: true, ..none.nmi }, ..none },
            Events { smi: Smi { smm: true, ..none.smi }, ..none },
            Events { smi: Smi { pending: true, ..none.smi }, ..none },
            Events { smi: Smi { inside_nmi: true, ..none.smi }, ..none },
            Events { smi: Smi { latched_init: true, ..none.smi }, ..none },
            Events { triple_fault: true, ..none },
        ];
        for events in each {
            let kvm = to_kvm(&events, ALL).unwrap();
            assert_ne!(kvm, to_kvm(&none, ALL).unwrap());
            assert_eq!(from_kvm(&kvm), events);
        }
    }

    #[test]
    fn an_event_that_this_kvm_would_drop_is_refused() {
        let lacking = EventParts::default();
        let mut events = Events {
            exception: Some(Exception::new(13, Some(0))),
            ..Events::default()
        };
        let kvm = to_kvm(&events, lacking).unwrap();
        assert_eq!((kvm.exception.injected, kvm.exception.pending), (1, 0));
        events.exception = events.exception.map(|exception| Exception {
            payload: Some(1),
            ..exception
        });
        let triple = Events {
            triple_fault: true,
            ..Events::default()
        };
        for events in [events, triple] {
            assert!(matches!(to_kvm(&events, lacking), Err(Error::HostLacks(_))));
        }
        for vector in [2, 32, 255] {
            let events = Events {
                exception: Some(Exception::new(vector, None)),
                ..Events::default()
            };
            let refused = Error::Invalid(Field::Vector, vector.into());
            assert_eq!(to_kvm(&events, ALL), Err(refused));
        }
    }
}
