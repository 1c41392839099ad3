//! What a migration TD asks of its TDX module and of the host's quoting service.

use kvm_ops_core::{Gpa, Privacy};
use kvm_ops_guest::tdx::{
    CompletionStatus, QuoteHeader, QuoteStatus, REPORT_LEN, VmcallStatus, leaf, report_request,
};
use zeroize::Zeroizing;

use crate::failure::Failure;
use crate::io::{BUFFER, BUFFER_BYTES, Io};
use crate::request::Exchange;
use crate::steps::{Done, Step};

/// The private page for reports, which is measured: the data in front, the report behind.
pub(crate) const WORK: Gpa = Gpa::new(0x1000);
const REPORT: u64 = 0x400;

/// TDG.VP.VMCALL of GetQuote.
const GET_QUOTE: u64 = 0x1_0002;

/// Fields of a TD that its migration TD may touch (TDX module ABI, "TDCS"), of four elements and of one.
const MIG_DEC_KEY: u64 = 0x9810_0003_0000_0010;
const MIG_ENC_KEY: u64 = 0x9810_0003_0000_0018;
const MIG_VERSION: u64 = 0x9810_0001_0000_0020;
const VERSION_MASK: u64 = 0xffff;

/// Tries of a TDCALL whose lock another thread holds.
const TRIES: u32 = 1 << 16;

/// A session key.
pub(crate) type SessionKey = Zeroizing<[u64; 4]>;

impl Io {
    /// Makes a TDCALL, again while another thread holds a lock: RAX, RCX, RDX, R8, R9, R10.
    async fn tdcall(&self, leaf: u64, args: [u64; 8]) -> Result<[u64; 6], Failure> {
        let mut status = CompletionStatus(0);
        for _ in 0..TRIES {
            let Done::Values(values) = self.0.step(Step::Tdcall { leaf, args }).await else {
                return Err(Failure::Host);
            };
            status = CompletionStatus(values[0]);
            if status.is_success() {
                return Ok(values);
            }
            if status.code() != CompletionStatus::OPERAND_BUSY {
                break;
            }
        }
        Err(Failure::Module(status.0))
    }

    /// A report over this data (TDG.MR.REPORT).
    pub(crate) async fn report(&self, data: &[u8; 64]) -> Result<[u8; REPORT_LEN], Failure> {
        self.write(WORK, Privacy::Private, data).await?;
        let at = Gpa::new(WORK.get() + REPORT);
        let regs = report_request(at.get(), WORK.get());
        let args = [regs.rcx, regs.rdx, 0, 0, 0, 0, 0, 0];
        self.tdcall(leaf::MR_REPORT, args).await?;
        let report = self.read(at, Privacy::Private, REPORT_LEN).await?;
        report.try_into().map_err(|_| Failure::Host)
    }

    /// A quote of a report (GetQuote). It is the host's word, and the peer's to judge.
    pub(crate) async fn quote(&self, report: &[u8; REPORT_LEN]) -> Result<Vec<u8>, Failure> {
        let header = QuoteHeader::request(REPORT_LEN as u32).to_bytes();
        self.show(&[&header[..], report].concat()).await?;
        let leaf = GET_QUOTE;
        let buffer = self.at(BUFFER, Privacy::Shared)?.get();
        let args = [buffer, BUFFER_BYTES, 0, 0];
        loop {
            match self.0.step(Step::Tdvmcall { leaf, args }).await {
                Done::Values([status, ..]) if status == VmcallStatus::SUCCESS.0 => break,
                Done::Values([status, ..]) if status == VmcallStatus::RETRY.0 => {}
                Done::Values([status, ..]) => return Err(Failure::NoQuote(status)),
                _ => return Err(Failure::Host),
            }
        }
        let header = loop {
            let bytes = self.read(BUFFER, Privacy::Shared, QuoteHeader::LEN).await?;
            let bytes = bytes.try_into().map_err(|_| Failure::Host)?;
            let header = QuoteHeader::from_bytes(bytes);
            if header.status != QuoteStatus::IN_FLIGHT {
                break header;
            }
        };
        let room = BUFFER_BYTES - QuoteHeader::LEN as u64;
        let len = header.out_len;
        if header.status != QuoteStatus::SUCCESS || len == 0 || u64::from(len) > room {
            return Err(Failure::NoQuote(header.status.0));
        }
        let at = Gpa::new(BUFFER.get() + QuoteHeader::LEN as u64);
        self.read(at, Privacy::Shared, len as usize).await
    }

    /// A new key with which the module encrypts what the TD sends (TDG.SERVTD.RD of MIG_ENC_KEY).
    pub(crate) async fn new_key(&self, of: &Exchange) -> Result<SessionKey, Failure> {
        let mut key = Zeroizing::new([0; 4]);
        for (n, word) in (0..).zip(key.iter_mut()) {
            let args = field(of, MIG_ENC_KEY + n, 0, 0);
            let [_, _, _, value, ..] = self.tdcall(leaf::SERVTD_RD, args).await?;
            *word = value;
        }
        Ok(key)
    }

    /// Sets the key with which the module decrypts what comes for the TD, and the version of the session
    /// (TDG.SERVTD.WR of MIG_DEC_KEY and MIG_VERSION).
    pub(crate) async fn set_key(
        &self,
        of: &Exchange,
        version: u16,
        key: &SessionKey,
    ) -> Result<(), Failure> {
        let args = field(of, MIG_VERSION, version.into(), VERSION_MASK);
        self.tdcall(leaf::SERVTD_WR, args).await?;
        for (n, word) in (0..).zip(key.iter()) {
            let args = field(of, MIG_DEC_KEY + n, *word, u64::MAX);
            self.tdcall(leaf::SERVTD_WR, args).await?;
        }
        Ok(())
    }
}

/// The operands of TDG.SERVTD.RD and TDG.SERVTD.WR.
const fn field(of: &Exchange, id: u64, value: u64, mask: u64) -> [u64; 8] {
    let [a, b, c, d] = of.uuid;
    [of.handle, id, value, mask, a, b, c, d]
}
