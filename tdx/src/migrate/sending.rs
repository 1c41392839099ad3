//! One link's part of a session, at the end that a TD leaves.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicUsize, Ordering};

use embedded_io::{Read, Write};
use kvm_ops::Host;
use kvm_ops_wire::{
    Challenge, Flow, MigrateError, Phase, Progress, ProtocolError, Reason, Refusal, TargetState,
};

use super::MAX_STREAMS;
use super::bundle::Bundle;
use super::record::{self, Kind, Wire, expected};
use super::sender::{Sender, progress};

type Result<T> = core::result::Result<T, MigrateError>;

/// One link's part of a session.
pub(super) struct Sending<'s, 'w, 'l, 'a, H: Host, L> {
    pub(super) sender: &'s mut Sender<'a, H>,
    pub(super) wire: &'w mut Wire<'l, L>,
    /// Bytes on earlier links.
    pub(super) before: u64,
}

impl<H: Host, L: Read + Write> Sending<'_, '_, '_, '_, H, L> {
    pub(super) fn all(&mut self, watch: &mut dyn FnMut(&Progress) -> Flow) -> Result<()> {
        if matches!(self.sender.phase, Phase::Committed | Phase::PostCopy) {
            return self.settle(watch);
        }
        match self.sender.phase {
            Phase::New => self.begin()?,
            _ => self.go_on()?,
        }
        self.copy(watch)?;
        self.stop(watch)?;
        self.prepare()?;
        self.report(watch)?;
        let token = match self.sender.post_copy {
            true => self.sender.source.early_start_token(),
            false => self.sender.source.start_token(),
        };
        self.sender.token = Some(MigrateError::at("TDH.EXPORT.TRACK", token)?);
        self.sender.phase = Phase::Committed;
        // Too late to cancel: the answer does not matter.
        let _ = self.report(watch);
        self.start(watch)?;
        let _ = self.report(watch);
        Ok(())
    }

    /// Tells the target, and gives the guest up, so that it runs on here.
    pub(super) fn cancel(&mut self) -> Result<()> {
        self.sender.cancel()?;
        // Told or not, the guest is the source's.
        let _ = self.wire.send(Kind::Cancel, self.sender.sent.next(), &[]);
        let _ = self.wire.flush();
        Ok(())
    }

    fn bind(&mut self, challenge: &Challenge) {
        let Sender { session, links, .. } = &*self.sender;
        self.wire.seal.bind(session, *links, challenge);
    }

    fn begin(&mut self) -> Result<()> {
        let shape = MigrateError::at("shape of the guest", self.sender.source.shape())?;
        let hello = record::hello(&self.sender.session, self.sender.links, &shape);
        let kind = match self.sender.post_copy {
            true => Kind::HelloPostCopy,
            false => Kind::Hello,
        };
        self.wire.send(kind, 0, &[&hello])?;
        match self.greeted()? {
            (TargetState::Receiving, 0) => {}
            _ => return Err(unlikely()),
        }
        let first = self.sender.source.begin();
        let first = MigrateError::at("TDH.EXPORT.STATE.IMMUTABLE", first)?;
        self.sender.phase = Phase::Copying;
        self.bundle(first)
    }

    /// After a link that broke before the start token.
    fn go_on(&mut self) -> Result<()> {
        self.resume()?;
        match self.greeted()? {
            (TargetState::Receiving | TargetState::Prepared, has) => {
                self.sender.sent.go_on(self.wire, has)
            }
            (TargetState::Owner | TargetState::Running, _) => Err(unlikely()),
        }
    }

    fn resume(&mut self) -> Result<()> {
        let link = self.sender.links.to_le_bytes();
        let session = self.sender.session;
        Ok(self.wire.send(Kind::Resume, 0, &[&session, &link])?)
    }

    /// Takes the target's state and challenge for this link, and the number of the record that is due there.
    fn greeted(&mut self) -> Result<(TargetState, u64)> {
        self.bind(&[0; 24]);
        let (due, payload) = self.answer(Kind::Ready)?;
        let (state, challenge) = TargetState::parse_ready(&payload)?;
        self.bind(&challenge);
        Ok((state, due))
    }

    /// Sends what is written, and takes an answer: its kind, number and payload. A target that gave the guest back,
    /// or lost it, says that instead.
    pub(super) fn hear(&mut self) -> Result<(Kind, u64, Vec<u8>)> {
        self.wire.flush()?;
        let (kind, index, payload) = self.wire.receive()?;
        match (kind, self.sender.phase) {
            (Kind::Returned, Phase::Committed) => {
                let token = record::parse_bundle(payload)?;
                Err(self.returned(&token))
            }
            (Kind::Lost, Phase::Committed | Phase::PostCopy) if self.sender.post_copy => {
                let why = Refusal::decode(payload)?;
                Err(self.lost(why))
            }
            (Kind::Refuse, _) => Err(MigrateError::Refused(Refusal::decode(payload)?)),
            _ => Ok((kind, index, payload.to_vec())),
        }
    }

    /// The same for an answer of this kind: its number and payload.
    fn answer(&mut self, due: Kind) -> Result<(u64, Vec<u8>)> {
        let (kind, index, payload) = self.hear()?;
        expected(kind, &payload, due)?;
        Ok((index, payload))
    }

    /// Numbers and sends a record.
    pub(super) fn send(&mut self, kind: Kind, payload: Vec<u8>) -> Result<()> {
        self.sender.sent.send(self.wire, kind, payload)
    }

    pub(super) fn bundle(&mut self, bundle: Bundle) -> Result<()> {
        self.sender.sent.send_bundle(self.wire, bundle)
    }

    /// Waits until the target has everything that was sent.
    pub(super) fn confirmed(&mut self, say: Kind, payload: Vec<u8>, answer: Kind) -> Result<()> {
        self.sender.sent.ask(self.wire, say, payload, answer)
    }

    fn copy(&mut self, watch: &mut dyn FnMut(&Progress) -> Flow) -> Result<()> {
        while self.sender.phase == Phase::Copying && self.sender.rounds > 0 {
            self.sender.rounds -= 1;
            self.round(watch)?;
            if self.sender.source.pages_left() <= self.sender.limits.pages_left {
                self.sender.rounds = 0;
            }
        }
        Ok(())
    }

    fn round(&mut self, watch: &mut dyn FnMut(&Progress) -> Flow) -> Result<()> {
        self.report(watch)?;
        self.pages(usize::MAX, watch)?;
        let token = MigrateError::at("TDH.EXPORT.TRACK", self.sender.source.end_round())?;
        self.bundle(token)?;
        let round = self.sender.source.carried().rounds.to_le_bytes();
        self.confirmed(Kind::RoundEnd, round.to_vec(), Kind::RoundOk)
    }

    /// The pages of a round, on all streams, or the first of them: so many bundles on each stream.
    pub(super) fn pages(
        &mut self,
        most: usize,
        watch: &mut dyn FnMut(&Progress) -> Flow,
    ) -> Result<()> {
        let Sender {
            source,
            threads,
            phase,
            sent: records,
            bytes,
            ..
        } = &mut *self.sender;
        let (source, wire, before) = (&*source, &mut *self.wire, self.before);
        let mut sent = Ok(());
        let mut send = |made: kvm_ops::Result<Bundle>| {
            let bundle = MigrateError::at("TDH.EXPORT.MEM", made)?;
            records.send_bundle(wire, bundle)?;
            *bytes = before + wire.bytes;
            match watch(&progress(source, *phase, *bytes)) {
                Flow::Cancel if *phase < Phase::Committed => Err(MigrateError::Cancelled),
                _ => Ok(()),
            }
        };
        let made = [const { AtomicUsize::new(0) }; MAX_STREAMS as usize];
        threads.make(
            source.streams(),
            &|stream| match made[usize::from(stream)].fetch_add(1, Ordering::Relaxed) < most {
                true => source.pages(stream).transpose(),
                false => None,
            },
            &mut |made| {
                sent = send(made);
                sent.is_ok()
            },
        );
        sent
    }

    fn stop(&mut self, watch: &mut dyn FnMut(&Progress) -> Flow) -> Result<()> {
        if self.sender.phase == Phase::Copying {
            MigrateError::at("TDH.EXPORT.PAUSE", self.sender.source.stop())?;
            self.sender.phase = Phase::Stopped;
            if self.sender.post_copy {
                MigrateError::at("pages put off", self.sender.source.put_off())?;
            }
            self.report(watch)?;
        }
        while self.sender.source.pages_due() > 0 {
            self.round(watch)?;
        }
        Ok(())
    }

    /// After a broken link: asks who has the guest.
    fn settle(&mut self, watch: &mut dyn FnMut(&Progress) -> Flow) -> Result<()> {
        self.resume()?;
        match (self.greeted()?, self.sender.phase) {
            ((TargetState::Owner, _), _) => self.done(),
            ((TargetState::Prepared, _), Phase::Committed) => self.start(watch),
            ((TargetState::Running, has), _) if self.sender.post_copy => {
                self.sender.phase = Phase::PostCopy;
                self.sender.sent.go_on(self.wire, has)?;
                self.follow(watch)
            }
            _ => Err(unlikely()),
        }
    }

    /// Sends the start token, and hears who has the guest.
    fn start(&mut self, watch: &mut dyn FnMut(&Progress) -> Flow) -> Result<()> {
        let Some(token) = self.sender.token.clone() else {
            return Err(MigrateError::WrongPhase);
        };
        let next = self.sender.sent.next();
        self.wire
            .send(Kind::Start, next, &[&record::bundle(&token)])?;
        if !self.sender.post_copy {
            self.answer(Kind::Done)?;
            return self.done();
        }
        self.answer(Kind::Running)?;
        self.sender.phase = Phase::PostCopy;
        self.follow(watch)
    }

    /// The target gave the guest back.
    fn returned(&mut self, token: &Bundle) -> MigrateError {
        if let Err(error) = self.sender.source.abort(Some(token)) {
            let operation = "TDH.EXPORT.ABORT";
            return MigrateError::Failed { operation, error };
        }
        self.sender.phase = Phase::Cancelled;
        MigrateError::Refused(Refusal {
            reason: Reason::Host,
            status: 0,
        })
    }

    pub(super) fn report(&mut self, watch: &mut dyn FnMut(&Progress) -> Flow) -> Result<()> {
        self.sender.bytes = self.before + self.wire.bytes;
        match watch(&self.sender.progress()) {
            Flow::Cancel if self.sender.phase < Phase::Committed => Err(MigrateError::Cancelled),
            _ => Ok(()),
        }
    }
}

/// A target that cannot be as far as it says.
fn unlikely() -> MigrateError {
    ProtocolError::Field("state of the target").into()
}
