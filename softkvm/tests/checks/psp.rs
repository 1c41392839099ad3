//! Commands of `/dev/sev`.

use crate::common::{Answer, World};
use crate::support::{Case, NOWHERE, sealed, short_of_memory};
use kvm_ops::Vendor;
use kvm_ops::sim::SimHost;
use kvm_ops_softkvm::Kernel;
use kvm_ops_uapi::checks::*;
use kvm_ops_uapi::psp::{self, *};
use kvm_ops_uapi::{U32, U64, ioctl};
use zerocopy::{Immutable, IntoBytes};

/// A command with the address of its structure.
fn at(w: &World, cmd: u32, data: u64) -> Answer {
    let issue = IssueCmd {
        cmd: U32::new(cmd),
        data: U64::new(data),
        ..IssueCmd::default()
    };
    w.call(w.sev, ioctl::SEV_ISSUE_CMD, &issue)
}

fn with<T: IntoBytes + Immutable>(w: &World, cmd: u32, args: &T) -> Answer {
    at(w, cmd, w.task.put(args))
}

/// The device, open for reading alone.
fn read_only(w: &World, cmd: u32) -> Answer {
    let issue = IssueCmd {
        cmd: U32::new(cmd),
        data: U64::new(w.task.map(4096)),
        ..IssueCmd::default()
    };
    let file = w.kernel().open_sev_for_reading().unwrap();
    let fd = w.task.open(file)?;
    w.call(fd, ioctl::SEV_ISSUE_CMD, &issue)
}

fn blob(address: u64, length: u32) -> Blob {
    Blob {
        address: U64::new(address),
        length: U32::new(length),
    }
}

fn import(w: &World, pek: (u64, u32), oca: (u64, u32)) -> Answer {
    let args = PekCertImport {
        pek_cert: U64::new(pek.0),
        pek_cert_len: U32::new(pek.1),
        oca_cert: U64::new(oca.0),
        oca_cert_len: U32::new(oca.1),
    };
    with(w, psp::PEK_CERT_IMPORT, &args)
}

fn export(w: &World, pdh: (u64, u32), chain: (u64, u32)) -> Answer {
    let args = PdhCertExport {
        pdh_cert: U64::new(pdh.0),
        pdh_cert_len: U32::new(pdh.1),
        cert_chain: U64::new(chain.0),
        cert_chain_len: U32::new(chain.1),
    };
    with(w, psp::PDH_CERT_EXPORT, &args)
}

fn vlek(w: &World, len: u32, version: u8) -> Answer {
    let args = SnpVlekLoad {
        len: U32::new(len),
        vlek_wrapped_version: version,
        vlek_wrapped: U64::new(NOWHERE),
        ..SnpVlekLoad::default()
    };
    with(w, psp::SNP_VLEK_LOAD, &args)
}

pub(crate) const CASES: &[Case] = &[
    (issue::NUMBER, |w| {
        w.ioctl(w.sev, ioctl::KVM_GET_API_VERSION, 0)
    }),
    (issue::COPY, |w| {
        w.ioctl(w.sev, ioctl::SEV_ISSUE_CMD, NOWHERE)
    }),
    (issue::KNOWN, |w| at(w, 13, 0)),
    (issue::KNOWN, |w| at(w, u32::MAX, 0)),
    (issue::COPY_BACK, |w| {
        let issue = IssueCmd {
            cmd: U32::new(psp::PLATFORM_STATUS),
            data: U64::new(w.task.map(4096)),
            ..IssueCmd::default()
        };
        w.ioctl(w.sev, ioctl::SEV_ISSUE_CMD, sealed(w, &issue))
    }),
    (factory_reset::WRITABLE, |w| {
        read_only(w, psp::FACTORY_RESET)
    }),
    (factory_reset::IDLE, |w| {
        w.launch(w.guest(2), 0);
        at(w, psp::FACTORY_RESET, 0)
    }),
    (platform_status::COPY_BACK, |w| {
        at(w, psp::PLATFORM_STATUS, NOWHERE)
    }),
    (key_gen::WRITABLE, |w| read_only(w, psp::PEK_GEN)),
    (key_gen::WRITABLE, |w| read_only(w, psp::PDH_GEN)),
    (pek_csr::WRITABLE, |w| read_only(w, psp::PEK_CSR)),
    (pek_csr::COPY, |w| at(w, psp::PEK_CSR, NOWHERE)),
    (pek_csr::LEN, |w| {
        with(w, psp::PEK_CSR, &blob(NOWHERE, 16385))
    }),
    (pek_csr::COPY_BACK, |w| {
        at(w, psp::PEK_CSR, sealed(w, &Blob::default()))
    }),
    (pek_csr::BUFFER, |w| {
        with(w, psp::PEK_CSR, &blob(NOWHERE, 16384))
    }),
    (pdh_cert_export::WRITABLE, |_| {
        let w = World::of(&Kernel::new(SimHost::new(Vendor::Amd)));
        at(&w, psp::FACTORY_RESET, 0)?;
        read_only(&w, psp::PDH_CERT_EXPORT)
    }),
    (pek_cert_import::WRITABLE, |w| {
        read_only(w, psp::PEK_CERT_IMPORT)
    }),
    (pek_cert_import::COPY, |w| {
        at(w, psp::PEK_CERT_IMPORT, NOWHERE)
    }),
    (pek_cert_import::PEK_LEN, |w| {
        import(w, (NOWHERE, 0), (NOWHERE, 0))
    }),
    (pek_cert_import::PEK_LEN, |w| {
        import(w, (NOWHERE, 16385), (NOWHERE, 0))
    }),
    (pek_cert_import::PEK, |w| {
        import(w, (NOWHERE, 16384), (NOWHERE, 0))
    }),
    (pek_cert_import::OCA_LEN, |w| {
        import(w, (w.task.map(16), 16), (0, 1))
    }),
    (pek_cert_import::OCA, |w| {
        import(w, (w.task.map(16), 16), (NOWHERE, 1))
    }),
    (pdh_cert_export::COPY, |w| {
        at(w, psp::PDH_CERT_EXPORT, NOWHERE)
    }),
    (pdh_cert_export::LEN, |w| {
        export(w, (NOWHERE, 16385), (NOWHERE, 1))
    }),
    (pdh_cert_export::LEN, |w| {
        export(w, (NOWHERE, 1), (NOWHERE, 16385))
    }),
    (pdh_cert_export::COPY_BACK, |w| {
        let query = sealed(w, &PdhCertExport::default());
        at(w, psp::PDH_CERT_EXPORT, query)
    }),
    (pdh_cert_export::BUFFERS, |w| {
        export(w, (w.task.map(16384), 16384), (NOWHERE, 16384))
    }),
    (get_id::COPY_BACK, |w| at(w, psp::GET_ID, NOWHERE)),
    (get_id2::COPY, |w| at(w, psp::GET_ID2, NOWHERE)),
    (get_id2::MEMORY, |w| {
        with(w, psp::GET_ID2, &blob(NOWHERE, u32::MAX))
    }),
    (get_id2::MEMORY, |_| {
        let call = |w: &World, _: &()| {
            let room = blob(w.task.map(4096), 4096);
            with(w, psp::GET_ID2, &room)
        };
        short_of_memory(Vendor::Amd, get_id2::MEMORY, |_| (), call)
    }),
    (get_id2::COPY_BACK, |w| {
        let room = blob(w.task.map(4096), 4096);
        at(w, psp::GET_ID2, sealed(w, &room))
    }),
    (get_id2::BUFFER, |w| {
        with(w, psp::GET_ID2, &blob(NOWHERE, 4096))
    }),
    (snp_platform_status::GIVEN, |w| {
        at(w, psp::SNP_PLATFORM_STATUS, 0)
    }),
    (snp_platform_status::COPY_BACK, |w| {
        at(w, psp::SNP_PLATFORM_STATUS, NOWHERE)
    }),
    (snp_set_config::GIVEN, |w| at(w, psp::SNP_SET_CONFIG, 0)),
    (snp_set_config::WRITABLE, |w| {
        read_only(w, psp::SNP_SET_CONFIG)
    }),
    (snp_set_config::COPY, |w| {
        at(w, psp::SNP_SET_CONFIG, NOWHERE)
    }),
    (snp_vlek_load::GIVEN, |w| at(w, psp::SNP_VLEK_LOAD, 0)),
    (snp_vlek_load::WRITABLE, |w| {
        read_only(w, psp::SNP_VLEK_LOAD)
    }),
    (snp_vlek_load::COPY, |w| at(w, psp::SNP_VLEK_LOAD, NOWHERE)),
    (snp_vlek_load::VERSION, |w| vlek(w, 15, 0)),
    (snp_vlek_load::VERSION, |w| vlek(w, 16, 1)),
    (snp_vlek_load::BLOB, |w| vlek(w, 16, 0)),
];
