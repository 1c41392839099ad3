//! Keys and certificates of the platform.

use kvm_ops_uapi::checks::{Check, key_gen, pdh_cert_export, pek_cert_import, pek_csr};
use kvm_ops_uapi::psp as uapi;
use kvm_ops_uapi::{U32, U64};
use soft_amd_sp::command::{PdhCertExport, PdhGen, PekCertImport, PekCsr, PekGen, PlatformStatus};

use super::Call;
use super::area::BLOB_MAX;
use crate::arg;
use crate::refusal::{Result, ensure};
use crate::sev::Failed;

/// A state of the platform: not initialised.
const UNINIT: u8 = 0;

pub(super) fn pek_gen(call: &Call<'_>) -> Result<(), Failed> {
    call.require_writable(key_gen::WRITABLE)?;
    call.initialised(|| call.run(&mut PekGen))
}

pub(super) fn pdh_gen(call: &Call<'_>) -> Result<(), Failed> {
    call.require_writable(key_gen::WRITABLE)?;
    call.initialised(|| call.run(&mut PdhGen))
}

/// Without a buffer firmware tells the length, and its status says so. The length is written back in any case.
pub(super) fn pek_csr(call: &Call<'_>) -> Result<(), Failed> {
    use pek_csr::{BUFFER, COPY, COPY_BACK, LEN, WRITABLE};
    call.require_writable(WRITABLE)?;
    let mut args: uapi::Blob = call.read(COPY)?;
    let (address, len) = (args.address.get(), args.length.get());
    let wanted = address != 0 && len != 0;
    ensure(!wanted || len <= BLOB_MAX, LEN)?;
    let area = call.area()?;
    let mut command = PekCsr::default();
    if wanted {
        (command.csr_paddr, command.csr_length) = (area.out(0)?.into(), len.into());
    }
    let done = call.initialised(|| call.run(&mut command));
    args.length = U32::new(command.csr_length.get());
    call.write(&args, COPY_BACK)?;
    done?;
    let bytes = area.read(0, args.length.get())?;
    Ok(arg::write(call.process, address, &bytes[..], BUFFER)?)
}

/// A blob of the caller's: 1 to 16384 bytes.
fn blob(
    call: &Call<'_>,
    (address, len): (U64, U32),
    (wrong_len, fault): (Check, Check),
) -> Result<Vec<u8>> {
    let len = len.get();
    let given = address.get() != 0 && (1..=BLOB_MAX).contains(&len);
    ensure(given, wrong_len)?;
    arg::read_bytes(call.process, address.get(), len as usize, fault)
}

pub(super) fn pek_cert_import(call: &Call<'_>) -> Result<(), Failed> {
    use pek_cert_import::{COPY, OCA, OCA_LEN, PEK, PEK_LEN, WRITABLE};
    call.require_writable(WRITABLE)?;
    let args: uapi::PekCertImport = call.read(COPY)?;
    let pek = blob(call, (args.pek_cert, args.pek_cert_len), (PEK_LEN, PEK))?;
    let oca = blob(call, (args.oca_cert, args.oca_cert_len), (OCA_LEN, OCA))?;
    let area = call.area()?;
    let mut command = PekCertImport {
        pek_cert_paddr: area.put(0, &pek)?.into(),
        pek_cert_length: (pek.len() as u32).into(),
        oca_cert_paddr: area.put(1, &oca)?.into(),
        oca_cert_length: (oca.len() as u32).into(),
        ..PekCertImport::default()
    };
    call.initialised(|| call.run(&mut command))
}

/// As [`pek_csr`], with two buffers.
pub(super) fn pdh_cert_export(call: &Call<'_>) -> Result<(), Failed> {
    use pdh_cert_export::{BUFFERS, COPY, COPY_BACK, LEN, WRITABLE};
    let mut status = PlatformStatus::default();
    call.run(&mut status)?;
    if status.state == UNINIT {
        call.require_writable(WRITABLE)?;
    }
    let mut args: uapi::PdhCertExport = call.read(COPY)?;
    let (pdh, chain) = (args.pdh_cert.get(), args.cert_chain.get());
    let lens = (args.pdh_cert_len.get(), args.cert_chain_len.get());
    let wanted = pdh != 0 && lens.0 != 0 && chain != 0;
    let short = lens.0 <= BLOB_MAX && lens.1 <= BLOB_MAX;
    ensure(!wanted || short, LEN)?;
    let area = call.area()?;
    let mut command = PdhCertExport::default();
    if wanted {
        command.pdh_cert_paddr = area.out(0)?.into();
        command.pdh_cert_length = lens.0.into();
        command.certs_paddr = area.out(1)?.into();
        command.certs_length = lens.1.into();
    }
    let done = call.initialised(|| call.run(&mut command));
    args.pdh_cert_len = U32::new(command.pdh_cert_length.get());
    args.cert_chain_len = U32::new(command.certs_length.get());
    call.write(&args, COPY_BACK)?;
    done?;
    for (n, address, len) in [(0, pdh, args.pdh_cert_len), (1, chain, args.cert_chain_len)] {
        let bytes = area.read(n, len.get())?;
        arg::write(call.process, address, &bytes[..], BUFFERS)?;
    }
    Ok(())
}
