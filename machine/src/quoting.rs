//! Quotes of TDs: GetQuote between a guest and the embedder's quoting service (GHCI, "GetQuote").

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvm_ops::{Answer, Exit, Gpa, PAGE_SIZE, TdxRequest, VcpuId};
use kvm_ops_guest::tdx::{QuoteHeader, QuoteStatus, VmcallStatus};

pub use kvm_ops_guest::tdx::REPORT_LEN as TD_REPORT_LEN;

use crate::{ExitContext, Inside, MachineError};

/// The most bytes of a buffer, header included. A quote has some 5 KiB.
const MAX_BUFFER: u64 = 128 << 10;
/// The most requests of a TD that wait: a guest has one, Linux two.
const MAX_WAITING: usize = 16;
/// Bits of R11 in the answer to GetTdVmCallInfo: GetQuote, and SetupEventNotifyInterrupt.
const OFFERED: u64 = 0b11;
/// The longest that [`Quoting::serve`] takes to notice the end of a run.
const WAIT: Duration = Duration::from_millis(20);

/// Why there is no quote.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoQuote {
    /// The report was not made on this platform, or the service failed.
    Refused,
    /// There is no service at the moment.
    Unavailable,
}

/// Makes quotes: a quoting enclave, a daemon on a vsock, or software.
///
/// ```
/// use kvm_ops_machine::{NoQuote, QuoteService, TD_REPORT_LEN};
///
/// /// Signs nothing.
/// fn refuse(_: &[u8; TD_REPORT_LEN]) -> Result<Vec<u8>, NoQuote> {
///     Err(NoQuote::Refused)
/// }
/// # let _: &dyn QuoteService = &refuse;
/// ```
pub trait QuoteService: Send + Sync {
    /// Turns a TD's report (TDREPORT_STRUCT) into a quote, after it has checked the report's MAC.
    ///
    /// # Errors
    /// [`NoQuote`], which the guest sees as the status of its buffer.
    fn quote(&self, report: &[u8; TD_REPORT_LEN]) -> Result<Vec<u8>, NoQuote>;
}

impl<F> QuoteService for F
where
    F: Fn(&[u8; TD_REPORT_LEN]) -> Result<Vec<u8>, NoQuote> + Send + Sync,
{
    fn quote(&self, report: &[u8; TD_REPORT_LEN]) -> Result<Vec<u8>, NoQuote> {
        self(report)
    }
}

/// The host's side of GetQuote, over a [`QuoteService`].
///
/// [`answer`](Self::answer) takes the guest's request in the handler of exits: the guest goes on, and its
/// buffer is IN_FLIGHT. [`serve`](Self::serve) makes the quotes on a thread of the machine, for as long
/// as it runs: the buffer gets quote and status, and the guest an interrupt if it has asked for one
/// (SetupEventNotifyInterrupt).
///
/// ```
/// use kvm_ops::{Kind, Tech, Vendor, guest::Script, sim::SimHost};
/// use kvm_ops_machine::{ConsoleSink, ExitContext, ExitHandler, Flow, Machine, MachineConfig};
/// use kvm_ops_machine::{NoQuote, Quoting, RunLimits, TD_REPORT_LEN};
///
/// let config = MachineConfig::new().kind(Kind::Of(Tech::Tdx)).memory(16 << 20);
/// let mut machine = Machine::build(&SimHost::new(Vendor::Intel), config.program(Script::new()))?;
/// let devices = machine.devices(ConsoleSink::discard());
/// let quoting = Quoting::new(|_: &[u8; TD_REPORT_LEN]| Err(NoQuote::Unavailable));
/// let handler = |exit: &mut ExitContext<'_>| match quoting.answer(exit) {
///     true => Flow::Continue,
///     false => devices.handle(exit),
/// };
/// machine.run_while(&handler, RunLimits::none(), |parts| quoting.serve(parts))?;
/// # Ok::<(), kvm_ops_machine::MachineError>(())
/// ```
#[derive(Debug)]
pub struct Quoting<S> {
    service: S,
    state: Mutex<State>,
    asked: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Buffer>,
    /// The vCPU that set it up last, and its vector.
    notify: Option<(VcpuId, u8)>,
}

/// A buffer that the guest shares: a header, then its report, then the quote in its place.
#[derive(Clone, Copy, Debug)]
struct Buffer {
    gpa: Gpa,
    bytes: u64,
}

impl<S: QuoteService> Quoting<S> {
    /// Over this service.
    pub fn new(service: S) -> Self {
        Self {
            service,
            state: Mutex::default(),
            asked: Condvar::new(),
        }
    }

    /// Answers an exit if it is about quotes: GetQuote, GetTdVmCallInfo, and
    /// SetupEventNotifyInterrupt. `false` for all others, which are not answered.
    ///
    /// A buffer is refused (INVALID_OPERAND) that is empty or longer than 128 KiB, that the guest does
    /// not share, that has another version, or that is IN_FLIGHT; one that is not whole pages
    /// (ALIGN_ERROR); and the 17th that waits (RETRY).
    pub fn answer(&self, exit: &mut ExitContext<'_>) -> bool {
        let Exit::Tdx(request) = exit.exit() else {
            return false;
        };
        let (status, r11) = match request {
            TdxRequest::GetQuote { gpa, bytes } => {
                (self.request(exit.machine(), Buffer { gpa, bytes }), 0)
            }
            TdxRequest::GetTdVmCallInfo { .. } => (VmcallStatus::SUCCESS, OFFERED),
            TdxRequest::SetupEventNotify { vector } => {
                self.lock().notify = Some((exit.vcpu(), vector));
                (VmcallStatus::SUCCESS, 0)
            }
            _ => return false,
        };
        let values = [r11, 0, 0, 0];
        let status = status.0;
        // It fits: the exit is one of a TD.
        exit.answer(Answer::Tdx { status, values }).is_ok()
    }

    fn request(&self, machine: &dyn Inside, buffer: Buffer) -> VmcallStatus {
        if !(buffer.gpa.get() | buffer.bytes).is_multiple_of(PAGE_SIZE) {
            return VmcallStatus::ALIGN_ERROR;
        }
        let is_bounded = (1..=MAX_BUFFER).contains(&buffer.bytes);
        if !is_bounded || buffer.check(machine).is_err() {
            return VmcallStatus::INVALID_OPERAND;
        }
        let mut state = self.lock();
        if state.waiting.len() == MAX_WAITING {
            return VmcallStatus::RETRY;
        }
        let taken = buffer.header(machine).is_ok_and(|header| {
            let is_ours =
                header.version == QuoteHeader::VERSION && header.status != QuoteStatus::IN_FLIGHT;
            is_ours && buffer.set(machine, QuoteStatus::IN_FLIGHT, 0).is_ok()
        });
        if !taken {
            return VmcallStatus::INVALID_OPERAND;
        }
        state.waiting.push_back(buffer);
        self.asked.notify_all();
        VmcallStatus::SUCCESS
    }

    /// Makes the quotes that are asked for until the run ends. Several threads may do so.
    pub fn serve(&self, machine: &dyn Inside) {
        while !machine.is_ending() {
            let Some((buffer, notify)) = self.next() else {
                continue;
            };
            let quote = buffer.report(machine).and_then(|report| {
                let quote = self.service.quote(&report)?;
                let is_whole = !quote.is_empty() && quote.len() <= buffer.room();
                is_whole.then_some(quote).ok_or(NoQuote::Refused)
            });
            // A guest that took its buffer back gets no quote, and hurts itself only.
            let _ = match quote {
                Ok(quote) => buffer.answer(machine, &quote),
                Err(NoQuote::Refused) => buffer.set(machine, QuoteStatus::ERROR, 0),
                Err(NoQuote::Unavailable) => buffer.set(machine, QuoteStatus::UNAVAILABLE, 0),
            };
            if let Some((vcpu, vector)) = notify {
                // A guest without a local APIC polls.
                let _ = machine.deliver_interrupt(vcpu, vector);
            }
        }
    }

    /// The request that has waited longest, and who is to be told; `None` after a short time without one.
    fn next(&self) -> Option<(Buffer, Option<(VcpuId, u8)>)> {
        let state = self.lock();
        let waited = self
            .asked
            .wait_timeout_while(state, WAIT, |state| state.waiting.is_empty());
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let buffer = state.waiting.pop_front()?;
        Some((buffer, state.notify))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No panic happens under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Buffer {
    /// The number of bytes behind the header.
    fn room(&self) -> usize {
        // At most 128 KiB, and at least a page.
        self.bytes as usize - QuoteHeader::LEN
    }

    fn data(&self) -> Gpa {
        Gpa::new(self.gpa.get() + QuoteHeader::LEN as u64)
    }

    /// Every page is memory that the guest shares.
    fn check(&self, machine: &dyn Inside) -> Result<(), MachineError> {
        let bytes = self.bytes as usize;
        machine.memory().check(self.gpa, bytes, true)
    }

    fn header(&self, machine: &dyn Inside) -> Result<QuoteHeader, MachineError> {
        let mut bytes = [0; QuoteHeader::LEN];
        machine.memory().read(self.gpa, &mut bytes)?;
        Ok(QuoteHeader::from_bytes(bytes))
    }

    /// The report of the guest's request.
    fn report(&self, machine: &dyn Inside) -> Result<[u8; TD_REPORT_LEN], NoQuote> {
        let mut report = [0; TD_REPORT_LEN];
        let header = self.header(machine).map_err(|_| NoQuote::Refused)?;
        let read = machine.memory().read(self.data(), &mut report);
        match read.is_ok() && header.in_len as usize == TD_REPORT_LEN {
            true => Ok(report),
            false => Err(NoQuote::Refused),
        }
    }

    /// Writes the quote, and then the header that says so.
    fn answer(&self, machine: &dyn Inside, quote: &[u8]) -> Result<(), MachineError> {
        machine.memory().write(self.data(), quote)?;
        self.set(machine, QuoteStatus::SUCCESS, quote.len() as u32)
    }

    fn set(
        &self,
        machine: &dyn Inside,
        status: QuoteStatus,
        out_len: u32,
    ) -> Result<(), MachineError> {
        let header = QuoteHeader {
            status,
            out_len,
            ..self.header(machine)?
        };
        let bytes = header.to_bytes();
        let (status, lengths) = (8, 16);
        let memory = machine.memory();
        let at = |offset: usize| Gpa::new(self.gpa.get() + offset as u64);
        // The status last: a guest that sees it sees the rest.
        memory.write(at(lengths), &bytes[lengths..])?;
        std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
        memory.write(at(status), &bytes[status..lengths])
    }
}
