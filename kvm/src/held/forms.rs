//! The forms of the commands: where their structures have addresses.

use kvm_ops::Call;
use kvm_ops_uapi::sev as uapi;

/// The length that goes with an address.
#[derive(Clone, Copy, Debug)]
pub(super) enum Len {
    /// A field of four bytes, at this offset.
    Word(usize),
    /// A field of eight bytes, at this offset.
    Long(usize),
    /// Always that many bytes.
    Fixed(u64),
}

/// A field with an address.
#[derive(Clone, Copy, Debug)]
pub(super) struct Address {
    pub(super) at: usize,
    pub(super) len: Len,
}

/// A command.
#[derive(Clone, Copy, Debug)]
pub(super) struct Form {
    pub(super) id: u32,
    pub(super) call: Call,
    /// Bytes of its structure.
    pub(super) bytes: usize,
    /// Memory of the caller's.
    pub(super) blobs: &'static [Address],
    /// Memory of the guest, which a slot lends.
    pub(super) guest: Option<Address>,
}

const fn at(at: usize, len: Len) -> Address {
    Address { at, len }
}

const fn form(id: u32, call: Call, bytes: usize) -> Form {
    Form {
        id,
        call,
        bytes,
        blobs: &[],
        guest: None,
    }
}

/// The commands that are passed on. Any other may have addresses that nothing here checks.
pub(super) const FORMS: &[Form] = &[
    form(uapi::INIT2, Call::SevInit2, size_of::<uapi::SevInit>()),
    Form {
        blobs: &[at(8, Len::Word(16)), at(24, Len::Word(32))],
        ..form(
            uapi::LAUNCH_START,
            Call::SevLaunchStart,
            size_of::<uapi::SevLaunchStart>(),
        )
    },
    Form {
        guest: Some(at(0, Len::Word(8))),
        ..form(
            uapi::LAUNCH_UPDATE_DATA,
            Call::SevLaunchUpdateData,
            size_of::<uapi::SevRange>(),
        )
    },
    form(uapi::LAUNCH_UPDATE_VMSA, Call::SevLaunchUpdateVmsa, 0),
    Form {
        blobs: &[at(0, Len::Word(8)), at(32, Len::Word(40))],
        guest: Some(at(16, Len::Word(24))),
        ..form(
            uapi::LAUNCH_SECRET,
            Call::SevLaunchSecret,
            size_of::<uapi::SevLaunchSecret>(),
        )
    },
    Form {
        blobs: &[at(0, Len::Word(8))],
        ..form(
            uapi::LAUNCH_MEASURE,
            Call::SevLaunchMeasure,
            size_of::<uapi::SevRange>(),
        )
    },
    form(uapi::LAUNCH_FINISH, Call::SevLaunchFinish, 0),
    form(
        uapi::GUEST_STATUS,
        Call::SevGuestStatus,
        size_of::<uapi::SevGuestStatus>(),
    ),
    Form {
        guest: Some(at(0, Len::Word(16))),
        blobs: &[at(8, Len::Word(16))],
        ..form(
            uapi::DBG_DECRYPT,
            Call::SevDbgDecrypt,
            size_of::<uapi::SevDbg>(),
        )
    },
    Form {
        blobs: &[at(0, Len::Word(16))],
        guest: Some(at(8, Len::Word(16))),
        ..form(
            uapi::DBG_ENCRYPT,
            Call::SevDbgEncrypt,
            size_of::<uapi::SevDbg>(),
        )
    },
    Form {
        blobs: &[at(16, Len::Word(24))],
        ..form(
            uapi::GET_ATTESTATION_REPORT,
            Call::SevAttestationReport,
            size_of::<uapi::SevAttestation>(),
        )
    },
    Form {
        blobs: &[
            at(8, Len::Word(16)),
            at(24, Len::Word(32)),
            at(40, Len::Word(48)),
            at(56, Len::Word(64)),
        ],
        ..form(
            uapi::SEND_START,
            Call::SevSendStart,
            size_of::<uapi::SevSendStart>(),
        )
    },
    Form {
        blobs: PACKET,
        guest: Some(at(16, Len::Word(24))),
        ..form(
            uapi::SEND_UPDATE_DATA,
            Call::SevSendUpdateData,
            size_of::<uapi::SevUpdateData>(),
        )
    },
    form(uapi::SEND_FINISH, Call::SevSendFinish, 0),
    form(uapi::SEND_CANCEL, Call::SevSendCancel, 0),
    Form {
        blobs: &[at(8, Len::Word(16)), at(24, Len::Word(32))],
        ..form(
            uapi::RECEIVE_START,
            Call::SevReceiveStart,
            size_of::<uapi::SevReceiveStart>(),
        )
    },
    Form {
        blobs: PACKET,
        guest: Some(at(16, Len::Word(24))),
        ..form(
            uapi::RECEIVE_UPDATE_DATA,
            Call::SevReceiveUpdateData,
            size_of::<uapi::SevUpdateData>(),
        )
    },
    form(uapi::RECEIVE_FINISH, Call::SevReceiveFinish, 0),
    form(
        uapi::SNP_LAUNCH_START,
        Call::SnpLaunchStart,
        size_of::<uapi::SnpLaunchStart>(),
    ),
    Form {
        blobs: &[at(8, Len::Long(16))],
        ..form(
            uapi::SNP_LAUNCH_UPDATE,
            Call::SnpLaunchUpdate,
            size_of::<uapi::SnpLaunchUpdate>(),
        )
    },
    Form {
        blobs: &[at(0, Len::Fixed(96)), at(8, Len::Fixed(4096))],
        ..form(
            uapi::SNP_LAUNCH_FINISH,
            Call::SnpLaunchFinish,
            size_of::<uapi::SnpLaunchFinish>(),
        )
    },
    form(uapi::SNP_ENABLE_REQ_CERTS, Call::SnpEnableReqCerts, 0),
];

/// Header and contents of a packet.
const PACKET: &[Address] = &[at(0, Len::Word(8)), at(32, Len::Word(40))];

/// The beginnings of VMs of type 0, which are taken here only: on a VM of another type the kernel has `INIT2`.
const OWN: &[Form] = &[
    form(uapi::INIT, Call::SevInit, 0),
    form(uapi::ES_INIT, Call::SevEsInit, 0),
];

/// The form of a command that this port issues itself.
pub(super) fn own_form(id: u32) -> Option<&'static Form> {
    OWN.iter().chain(FORMS).find(|form| form.id == id)
}

/// The form of a command that is passed on.
pub(super) fn form_of(id: u32) -> Option<&'static Form> {
    FORMS.iter().find(|form| form.id == id)
}
