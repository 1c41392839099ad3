//! Quotes that the host's quoting service owes to the TD.

use super::builder::Quoting;
use super::td::Inner;
use crate::sync::lock;
use kvm_ops_guest::GpaRange;
use kvm_ops_guest::tdx::{QuoteHeader, QuoteStatus, REPORT_LEN};
use soft_tdx_module::Platform;

/// The quoting service, and what it has not answered.
pub(super) struct Quotes {
    service: Option<Quoting>,
    delay: u64,
    owed: Vec<Owed>,
}

/// A request that was taken.
struct Owed {
    buffer: GpaRange,
    header: QuoteHeader,
    instructions: u64,
}

impl Quotes {
    pub(super) fn new(service: Option<Quoting>, delay: u64) -> Self {
        Self {
            service,
            delay,
            owed: Vec::new(),
        }
    }

    /// The requests that are due; an instruction of the guest has passed.
    fn due(&mut self) -> Vec<Owed> {
        let (due, owed) = std::mem::take(&mut self.owed)
            .into_iter()
            .partition(|owed| owed.instructions == 0);
        self.owed = owed;
        for owed in &mut self.owed {
            owed.instructions -= 1;
        }
        due
    }

    fn quote(
        &mut self,
        report: &[u8; REPORT_LEN],
        platform: &Platform,
        room: usize,
    ) -> Result<Vec<u8>, QuoteStatus> {
        let service = self.service.as_mut().ok_or(QuoteStatus::UNAVAILABLE)?;
        let quote = service(report, platform)?;
        if quote.len() > room {
            return Err(QuoteStatus::ERROR);
        }
        Ok(quote)
    }
}

impl Inner {
    pub(super) fn request_quote(&self, buffer: GpaRange, header: QuoteHeader) {
        let mut quotes = lock(&self.quotes);
        let instructions = quotes.delay;
        quotes.owed.push(Owed {
            buffer,
            header,
            instructions,
        });
    }

    /// Answers the quotes that are due. Called before each instruction of the guest.
    pub(super) fn quotes_come_in(&self) {
        let mut quotes = lock(&self.quotes);
        if quotes.owed.is_empty() {
            return;
        }
        for owed in quotes.due() {
            let answer = self
                .report_of(&owed)
                .and_then(|(report, room)| quotes.quote(&report, &self.machine.p, room));
            match answer {
                Ok(quote) => self.answer_quote(owed.buffer, QuoteStatus::SUCCESS, &quote),
                Err(status) => self.answer_quote(owed.buffer, status, &[]),
            }
        }
    }

    /// The TDREPORT of a request, and the room for its quote.
    fn report_of(&self, owed: &Owed) -> Result<([u8; REPORT_LEN], usize), QuoteStatus> {
        let room = owed.buffer.bytes() as usize - QuoteHeader::LEN;
        let mut report = [0; REPORT_LEN];
        let at = owed.buffer.start() + QuoteHeader::LEN as u64;
        let is_report = owed.header.in_len as usize == REPORT_LEN;
        if !is_report || self.machine.p.read_memory(at, &mut report).is_err() {
            return Err(QuoteStatus::ERROR);
        }
        Ok((report, room))
    }

    /// Writes data and header of an answer. Memory that is gone by now gets none.
    pub(super) fn answer_quote(&self, buffer: GpaRange, status: QuoteStatus, quote: &[u8]) {
        let at = buffer.start();
        let mut bytes = [0; QuoteHeader::LEN];
        if self.machine.p.read_memory(at, &mut bytes).is_err() {
            return;
        }
        let header = QuoteHeader {
            status,
            out_len: quote.len() as u32,
            ..QuoteHeader::from_bytes(bytes)
        };
        let data = at + QuoteHeader::LEN as u64;
        // The buffer is memory: the request was checked.
        let _ = self.machine.p.write_memory(data, quote);
        let _ = self.machine.p.write_memory(at, &header.to_bytes());
    }
}
