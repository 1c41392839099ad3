//! The completion of an exit: the caller's answer, which is in the run page when the vCPU runs again.

use kvm_ops::{Answer, VcpuOps};
use kvm_ops_uapi::Errno;
use kvm_ops_uapi::checks::run::COMPLETION;
use kvm_ops_uapi::run::{Hypercall, Mmio, MsrExit, SnpReqCerts, TdVmCallInfo, TdxExit};
use kvm_ops_uapi::tdx::tdvmcall;
use zerocopy::FromBytes;

use super::page::{PORT_DATA, Page};
use crate::machine::Processor;
use crate::refusal::{Result, ensure};

/// The exit that waits for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waits {
    Nothing,
    /// Items from a port.
    Port,
    /// Bytes from a device.
    Device,
    /// The value of an MSR, or #GP.
    ReadMsr,
    /// Nothing, or #GP.
    WriteMsr,
    /// A result.
    Hypercall,
    /// A result of a TD's MapGPA, of which the kernel takes three.
    MapGpa,
    /// The answer to a TD's request.
    Tdx,
    /// Certificates for an SNP guest's report, of which the kernel takes four results.
    Certificates,
}

impl Waits {
    /// Hands the answer to the processor.
    pub(super) fn answer(&mut self, page: Page<'_>, vcpu: &mut Processor) -> Result<()> {
        match std::mem::replace(self, Self::Nothing) {
            Self::Nothing => {}
            Self::Port => page.0.read(PORT_DATA, vcpu.exit_data()),
            Self::Device => {
                let mmio: Mmio = page.exit();
                let data = vcpu.exit_data();
                let len = data.len().min(mmio.data.len());
                data[..len].copy_from_slice(&mmio.data[..len]);
            }
            waits @ (Self::ReadMsr | Self::WriteMsr) => {
                let msr: MsrExit = page.exit();
                if msr.error != 0 {
                    vcpu.answer(Answer::InjectGp)?;
                } else if waits == Self::ReadMsr {
                    vcpu.answer(Answer::Msr(msr.data.get()))?;
                }
            }
            Self::Hypercall => {
                let call: Hypercall = page.exit();
                vcpu.answer(Answer::Value(call.ret.get()))?;
            }
            Self::MapGpa => {
                let call: Hypercall = page.exit();
                let ret = call.ret.get();
                let known = [0, Errno::EINVAL.0 as u64, Errno::EAGAIN.0 as u64];
                ensure(known.contains(&ret), COMPLETION)?;
                vcpu.answer(Answer::Value(ret))?;
            }
            Self::Tdx => vcpu.answer(tdx_answer(&page.exit()))?,
            Self::Certificates => {
                let call: SnpReqCerts = page.exit();
                let ret = call.ret.get();
                let errnos = [Errno::ENOSPC, Errno::EAGAIN, Errno::EIO];
                let known = ret == 0 || errnos.iter().any(|errno| errno.0 as u64 == ret);
                ensure(known, COMPLETION)?;
                vcpu.answer(Answer::SnpCertificates {
                    errno: ret as u32,
                    pages: call.npages.get(),
                })?;
            }
        }
        Ok(())
    }
}

/// The answer to a request: a status, and the registers of GetTdVmCallInfo. The status is the first word of
/// every request.
fn tdx_answer(exit: &TdxExit) -> Answer {
    let call = TdVmCallInfo::read_from_prefix(&exit.call);
    let call = call.map(|(call, _)| call).unwrap_or_default();
    let values = match exit.nr.get() {
        tdvmcall::GET_TD_VM_CALL_INFO => [call.r11, call.r12, call.r13, call.r14].map(|r| r.get()),
        _ => [0; 4],
    };
    Answer::Tdx {
        status: call.ret.get(),
        values,
    }
}
