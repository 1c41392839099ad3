//! State and shared memory of a TD that leaves: all that is left once its pages travelled, but the start
//! token.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use embedded_io::{Read, Write};
use kvm_ops::{Error, Gfn, Host, PAGE_SIZE, VcpuId};
use kvm_ops_wire::{MigrateError, Phase};

use super::record::Kind;
use super::sender::Sender;
use super::sending::Sending;

type Result<T> = core::result::Result<T, MigrateError>;

/// A step of the rest: all that is left but the start token.
pub(super) enum Rest {
    /// Shared memory: first frame and frames.
    Shared(Gfn, u64),
    TdState,
    Vcpu(VcpuId),
    ExitState(VcpuId),
    Prepare,
}

impl<H: Host> Sender<'_, H> {
    /// The steps that are left once all pages travelled.
    fn all_the_rest(&self) -> VecDeque<Rest> {
        let shared = self.source.shared().into_iter();
        let vcpus = self.source.vcpus().into_iter();
        shared
            .map(|(first, pages)| Rest::Shared(first, pages))
            .chain([Rest::TdState])
            .chain(vcpus.flat_map(|vcpu| [Rest::Vcpu(vcpu), Rest::ExitState(vcpu)]))
            .chain([Rest::Prepare])
            .collect()
    }
}

impl<H: Host, L: Read + Write> Sending<'_, '_, '_, '_, H, L> {
    /// State and shared memory: all that is left but the start token.
    pub(super) fn prepare(&mut self) -> Result<()> {
        if self.sender.rest.is_none() {
            self.sender.rest = Some(self.sender.all_the_rest());
        }
        while let Some(step) = self.sender.rest.as_mut().and_then(VecDeque::pop_front) {
            self.step(step)?;
        }
        self.sender.phase = Phase::Prepared;
        Ok(())
    }

    fn step(&mut self, step: Rest) -> Result<()> {
        match step {
            Rest::Shared(first, pages) => {
                if let (Some(next), Some(rest)) = (first.checked_add(1), &mut self.sender.rest)
                    && pages > 1
                {
                    rest.push_front(Rest::Shared(next, pages - 1));
                }
                self.shared(first)
            }
            Rest::TdState => {
                let state = self.sender.source.td_state();
                self.bundle(MigrateError::at("TDH.EXPORT.STATE.TD", state)?)
            }
            Rest::Vcpu(vcpu) => {
                let state = self.sender.source.vcpu_state(vcpu, 0);
                self.bundle(MigrateError::at("TDH.EXPORT.STATE.VP", state)?)
            }
            Rest::ExitState(vcpu) => {
                let state = match &mut self.sender.exit_states {
                    Some(states) => states(vcpu),
                    None => self.sender.source.exit_state(vcpu),
                };
                let state = MigrateError::at("exit state", state)?.encode();
                let mut payload = Vec::from(vcpu.0.to_le_bytes());
                payload.extend_from_slice(&state);
                self.send(Kind::ExitState, payload)
            }
            Rest::Prepare => self.confirmed(Kind::Prepare, Vec::new(), Kind::Prepared),
        }
    }

    fn shared(&mut self, gfn: Gfn) -> Result<()> {
        let mut page = [0; PAGE_SIZE as usize];
        match self.sender.source.read_shared(gfn, &mut page) {
            // Shared, but in no slot: nothing is there.
            Err(Error::NotFound(..)) => return Ok(()),
            read => MigrateError::at("shared page", read)?,
        }
        let mut payload = Vec::from(gfn.get().to_le_bytes());
        if page.iter().any(|byte| *byte != 0) {
            payload.extend_from_slice(&page);
        }
        self.send(Kind::Shared, payload)?;
        self.sender.sent.bound(self.wire)
    }
}
