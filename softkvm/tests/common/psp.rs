//! Commands of `/dev/sev`.

use kvm_ops_softkvm::Process;
use kvm_ops_uapi::psp::{self, IssueCmd, PdhCertExport};
use kvm_ops_uapi::{Errno, U32, U64, ioctl};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::World;

/// A status of firmware.
pub(crate) const INVALID_LEN: u32 = 4;

/// Errno, status of firmware, and the structure afterwards.
pub(crate) fn issue<T>(w: &World, cmd: u32, args: &T) -> (Result<(), Errno>, u32, T)
where
    T: FromBytes + FromZeros + IntoBytes + Immutable,
{
    let data = w.task.put(args);
    let at = w.task.put(&IssueCmd {
        cmd: U32::new(cmd),
        data: U64::new(data),
        error: U32::new(0xdead),
    });
    let answer = w.ioctl(w.sev, ioctl::SEV_ISSUE_CMD, at);
    let back: IssueCmd = w.task.get(at).unwrap();
    let answer = answer.map(drop).map_err(|refusal| refusal.errno());
    (answer, back.error.get(), w.task.get(data).unwrap())
}

pub(crate) fn done<T>(w: &World, cmd: u32, args: &T) -> T
where
    T: FromBytes + FromZeros + IntoBytes + Immutable,
{
    let (answer, error, args) = issue(w, cmd, args);
    assert_eq!((answer, error), (Ok(()), 0), "{cmd}");
    args
}

pub(crate) fn bytes(w: &World, address: u64, len: u32) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    w.task.read(address, &mut bytes).unwrap();
    bytes
}

/// The platform's certificate, and its chain.
pub(crate) fn certificates(w: &World) -> (Vec<u8>, Vec<u8>) {
    let (answer, error, told) = issue(w, psp::PDH_CERT_EXPORT, &PdhCertExport::default());
    assert_eq!((answer, error), (Err(Errno::EIO), INVALID_LEN));
    let (pdh, chain) = (told.pdh_cert_len.get(), told.cert_chain_len.get());
    let args = PdhCertExport {
        pdh_cert: U64::new(w.task.map(pdh as usize)),
        cert_chain: U64::new(w.task.map(chain as usize)),
        ..told
    };
    let back = done(w, psp::PDH_CERT_EXPORT, &args);
    assert_eq!(back, args);
    (
        bytes(w, args.pdh_cert.get(), pdh),
        bytes(w, args.cert_chain.get(), chain),
    )
}
