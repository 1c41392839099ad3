//! Records that were sent and that the target has not confirmed: they are sent again after a broken link.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use embedded_io::{Read, Write};
use kvm_ops_wire::{MigrateError, ProtocolError};

use super::bundle::Bundle;
use super::record::{Kind, Wire, expected};

type Result<T> = core::result::Result<T, MigrateError>;

/// Bytes of bundles after which the source asks the target whether it has them.
const MOST: usize = 8 << 20;

/// A record, in the parts in which it is written.
struct Sent {
    kind: Kind,
    head: Vec<u8>,
    body: Vec<u8>,
    /// The answer that it asks for.
    answer: Option<Kind>,
}

/// The records that the target has not confirmed, in order. The source waits for an answer as soon as it
/// has asked for one, so no record but the last asks.
#[derive(Default)]
pub(super) struct Unconfirmed {
    records: VecDeque<Sent>,
    bytes: usize,
    /// The number of the next record.
    next: u64,
}

impl Unconfirmed {
    /// The number of the next record.
    pub(super) const fn next(&self) -> u64 {
        self.next
    }

    /// The number of the oldest record that is kept, or of the next.
    fn oldest(&self) -> u64 {
        self.next - self.records.len() as u64
    }

    /// Sends a record. It is kept, also if the link fails.
    pub(super) fn send<L: Read + Write>(
        &mut self,
        wire: &mut Wire<'_, L>,
        kind: Kind,
        payload: Vec<u8>,
    ) -> Result<()> {
        let sent = Sent {
            kind,
            head: payload,
            body: Vec::new(),
            answer: None,
        };
        self.keep_and_send(wire, sent)
    }

    /// Sends a bundle, and after some asks whether the target has them.
    pub(super) fn send_bundle<L: Read + Write>(
        &mut self,
        wire: &mut Wire<'_, L>,
        bundle: Bundle,
    ) -> Result<()> {
        let sent = Sent {
            kind: Kind::Bundle,
            head: bundle.encoded_head(),
            body: bundle.pages,
            answer: None,
        };
        self.keep_and_send(wire, sent)?;
        self.bound(wire)
    }

    /// Sends a record and waits for its answer, by which the target has everything that was sent.
    pub(super) fn ask<L: Read + Write>(
        &mut self,
        wire: &mut Wire<'_, L>,
        kind: Kind,
        payload: Vec<u8>,
        answer: Kind,
    ) -> Result<()> {
        let sent = Sent {
            kind,
            head: payload,
            body: Vec::new(),
            answer: Some(answer),
        };
        self.keep_and_send(wire, sent)?;
        self.wait(wire)
    }

    /// Asks whether the target has what was sent, if that is much.
    pub(super) fn bound<L: Read + Write>(&mut self, wire: &mut Wire<'_, L>) -> Result<()> {
        match self.bytes >= MOST {
            true => self.ask(wire, Kind::Sync, Vec::new(), Kind::Synced),
            false => Ok(()),
        }
    }

    /// Goes on over a new link with a target that has all records below that number.
    pub(super) fn go_on<L: Read + Write>(
        &mut self,
        wire: &mut Wire<'_, L>,
        has: u64,
    ) -> Result<()> {
        if !(self.oldest()..=self.next).contains(&has) {
            return Err(self.unlike(has));
        }
        self.forget(has);
        self.send_from(wire, 0)?;
        self.wait(wire)
    }

    /// The target has everything that was sent, if it says the number of the next record.
    pub(super) fn confirm(&mut self, index: u64) -> Result<()> {
        match index == self.next {
            true => self.forget(index),
            false => return Err(self.unlike(index)),
        }
        Ok(())
    }

    fn keep_and_send<L: Read + Write>(&mut self, wire: &mut Wire<'_, L>, sent: Sent) -> Result<()> {
        self.bytes += sent.head.len() + sent.body.len();
        self.records.push_back(sent);
        self.next += 1;
        self.send_from(wire, self.records.len() - 1)
    }

    /// Sends the kept records from the `first` on.
    fn send_from<L: Read + Write>(&self, wire: &mut Wire<'_, L>, first: usize) -> Result<()> {
        let numbers = self.oldest()..;
        for (sent, number) in self.records.iter().zip(numbers).skip(first) {
            wire.send(sent.kind, number, &[&sent.head, &sent.body])?;
        }
        Ok(())
    }

    /// Waits for the answer that the last record asks for, if it does.
    fn wait<L: Read + Write>(&mut self, wire: &mut Wire<'_, L>) -> Result<()> {
        let Some(answer) = self.records.back().and_then(|sent| sent.answer) else {
            return Ok(());
        };
        wire.flush()?;
        let (kind, index, payload) = wire.receive()?;
        expected(kind, payload, answer)?;
        self.confirm(index)
    }

    fn forget(&mut self, below: u64) {
        while self.oldest() < below
            && let Some(sent) = self.records.pop_front()
        {
            self.bytes -= sent.head.len() + sent.body.len();
        }
    }

    fn unlike(&self, got: u64) -> MigrateError {
        let due = self.next;
        ProtocolError::Index { due, got }.into()
    }
}
