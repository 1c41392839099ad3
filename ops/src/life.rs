//! The life cycle that every back end shares: identity, step, and the tokens of the teardown.

use core::sync::atomic::{AtomicU8, Ordering};

use crate::diagnosis::Failures;
use crate::{
    Diagnosis, Drained, Error, Field, KeyReleased, Result, Step, Tech, VcpuId, VmId, serial,
};

/// The identity of a VM and the step of its life that it is in. vCPU threads read it while the owner
/// of the VM moves it on.
///
/// Tokens carry the identity of the `Life` that made them. They prove nothing about another VM, even
/// one with the same [`VmId`] on another host.
#[derive(Debug)]
pub struct Life {
    id: VmId,
    tech: Tech,
    serial: u64,
    /// A [`Step`], with [`AWAY`] while the guest is away.
    step: AtomicU8,
    failures: Failures,
}

/// The bit beside the step while the guest is away. No step has it, so whoever asks for one fails.
const AWAY: u8 = 1 << 7;

impl Life {
    /// A VM that is just created.
    pub fn new(id: VmId, tech: Tech) -> Self {
        Self {
            id,
            tech,
            serial: serial::next(),
            step: AtomicU8::new(Step::Created as u8),
            failures: Failures::default(),
        }
    }

    /// The number of the VM.
    #[inline]
    pub const fn id(&self) -> VmId {
        self.id
    }

    /// The technology of the VM.
    #[inline]
    pub const fn tech(&self) -> Tech {
        self.tech
    }

    /// The step that the VM is in. A VM whose guest is away counts as poisoned.
    #[inline]
    pub fn step(&self) -> Step {
        Self::named(self.step.load(Ordering::Acquire))
    }

    /// The step that the VM is in, or comes back to.
    pub fn step_at_home(&self) -> Step {
        Self::named(self.step.load(Ordering::Acquire) & !AWAY)
    }

    fn named(raw: u8) -> Step {
        // Only this file writes it: steps, and the bit that makes it none.
        Step::ALL
            .into_iter()
            .find(|step| *step as u8 == raw)
            .unwrap_or(Step::Poisoned)
    }

    /// Succeeds in that step only.
    ///
    /// # Errors
    /// [`Error::WrongState`] with the step that the VM is in, or [`Error::Poisoned`].
    #[inline]
    pub fn require(&self, wanted: Step) -> Result<()> {
        if self.step.load(Ordering::Acquire) == wanted as u8 {
            return Ok(());
        }
        self.step().require(wanted)
    }

    /// Succeeds while the VM's key is in use and nothing failed: slots and vCPUs may change.
    ///
    /// # Errors
    /// As [`require`](Self::require).
    #[inline]
    pub fn require_live(&self) -> Result<()> {
        self.step().require_live()
    }

    /// Moves the VM on: `Created -> Initialized` or `Initialized -> Runnable`.
    ///
    /// # Errors
    /// As [`require`](Self::require), for a VM that is not in the step before `to`, and
    /// [`Error::WrongState`] for a `to` that is neither.
    pub fn advance(&self, to: Step) -> Result<()> {
        let from = match to {
            Step::Initialized => Step::Created,
            Step::Runnable => Step::Initialized,
            _ => return Err(Error::WrongState(self.step())),
        };
        self.step
            .compare_exchange(from as u8, to as u8, Ordering::AcqRel, Ordering::Acquire)
            .map(drop)
            .or_else(|_| self.step().require(from))
    }

    /// The guest is on its way to another VM: until it comes back, only the teardown is allowed. A
    /// VM that is poisoned, or whose key is released, stays as it is.
    pub fn go_away(&self) {
        let _ = self
            .step
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |raw| {
                (raw < Step::KeyReleased as u8).then_some(raw | AWAY)
            });
    }

    /// Undoes [`go_away`](Self::go_away): the VM is in its step again.
    pub fn come_back(&self) {
        let _ = self
            .step
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |raw| {
                (raw & AWAY != 0).then_some(raw & !AWAY)
            });
    }

    /// Leaves only the teardown allowed, after a failure that cannot be undone. A VM whose key is
    /// released has nothing left that could break, and stays as it is.
    pub fn poison(&self) {
        let _ = self
            .step
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |raw| {
                let step = raw & !AWAY;
                (step < Step::KeyReleased as u8 || step == Step::Poisoned as u8)
                    .then_some(Step::Poisoned as u8)
            });
    }

    /// Poisons the VM as [`poison`](Self::poison) does, and remembers why. The first reason stays.
    #[cold]
    pub fn poison_by(&self, diagnosis: Diagnosis) {
        self.failures.note_fatal(diagnosis);
        self.poison();
    }

    /// Remembers a failure that changed nothing, until the next one.
    #[cold]
    pub fn note(&self, diagnosis: Diagnosis) {
        self.failures.note(diagnosis);
    }

    /// Adds to a failure that is remembered with this error the vCPU that met it.
    #[cold]
    pub fn note_vcpu(&self, error: Error, vcpu: VcpuId) {
        self.failures.on_vcpu(error, vcpu);
    }

    /// All that is known of an error that an operation of this VM returned: the failure that is
    /// remembered with it, for [`Error::Poisoned`] the one that poisoned the VM; else the error alone.
    #[cold]
    pub fn explain(&self, error: Error) -> Diagnosis {
        let known = self.failures.find(error);
        known.unwrap_or_else(|| Diagnosis::of(self.tech, self.id, error))
    }

    /// Records that the VM's key is gone, and makes the token. A token that was lost is made again.
    ///
    /// # Safety
    /// The VM's key is released as far as its technology demands it: for TDX, TDH.MNG.KEY.FREEID
    /// succeeded; for SEV, DEACTIVATE and DECOMMISSION did. Pages reclaimed on a false proof can be
    /// read through stale cache lines, or machine-check the host.
    pub unsafe fn key_released(&self) -> KeyReleased {
        let _ = self
            .step
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |raw| {
                (raw != Step::Drained as u8).then_some(Step::KeyReleased as u8)
            });
        KeyReleased::of(self.id, self.serial)
    }

    /// Records that the key of a VM that never had one is gone.
    pub fn release_without_key(&self) -> KeyReleased {
        // SAFETY: there is no key. A back end whose VMs have keys does not call this.
        unsafe { self.key_released() }
    }

    /// Checks that a token is this VM's.
    ///
    /// # Errors
    /// [`Error::Invalid`] with [`Field::Token`] and the VM of the token.
    pub fn check_released(&self, token: &KeyReleased) -> Result<()> {
        self.check(token.vm(), token.serial())
    }

    /// Checks that a token is this VM's.
    ///
    /// # Errors
    /// [`Error::Invalid`] with [`Field::Token`] and the VM of the token.
    pub fn check_drained(&self, token: &Drained) -> Result<()> {
        self.check(token.vm(), token.serial())
    }

    fn check(&self, vm: VmId, serial: u64) -> Result<()> {
        if serial == self.serial {
            Ok(())
        } else {
            Err(Error::Invalid(Field::Token, vm.0))
        }
    }

    /// Checks that the VM may be drained now, on the proof of `released`. The token comes back with the
    /// error.
    ///
    /// # Errors
    /// As [`check_released`](Self::check_released) and [`require`](Self::require). A VM that is drained
    /// already passes.
    pub fn check_drain(&self, released: KeyReleased) -> Result<KeyReleased, (Error, KeyReleased)> {
        let checked = self.check_released(&released).and_then(|()| {
            self.step()
                .require_one_of(&[Step::KeyReleased, Step::Drained])
        });
        match checked {
            Ok(()) => Ok(released),
            Err(error) => Err((error, released)),
        }
    }

    /// Records that the VM has no private pages left, and makes the next token.
    ///
    /// # Errors
    /// As [`check_drain`](Self::check_drain).
    ///
    /// # Safety
    /// Every page that the VM's second-level tables mapped as private, and every page of those tables,
    /// is reclaimed or leaked for good. Such a page is not freed later.
    pub unsafe fn drained(&self, released: KeyReleased) -> Result<Drained, (Error, KeyReleased)> {
        let released = self.check_drain(released)?;
        self.step.store(Step::Drained as u8, Ordering::Release);
        Ok(Drained::of(released))
    }

    /// Records that a VM that never had private pages is drained.
    ///
    /// # Errors
    /// As [`check_drain`](Self::check_drain).
    pub fn drain_without_private_pages(
        &self,
        released: KeyReleased,
    ) -> Result<Drained, (Error, KeyReleased)> {
        // SAFETY: there are no private pages. A back end whose VMs have some does not call this.
        unsafe { self.drained(released) }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;

    fn life() -> Life {
        Life::new(VmId(1), Tech::Vmx)
    }

    /// Brings a new life to a step.
    fn at(step: Step) -> Life {
        let life = life();
        match step {
            Step::Created => {}
            Step::Initialized => life.advance(Step::Initialized).unwrap(),
            Step::Runnable => {
                life.advance(Step::Initialized).unwrap();
                life.advance(Step::Runnable).unwrap();
            }
            Step::KeyReleased => drop(life.release_without_key()),
            Step::Drained => {
                let token = life.release_without_key();
                let _ = life.drain_without_private_pages(token).unwrap();
            }
            Step::Poisoned => life.poison(),
        }
        life
    }

    #[test]
    fn each_transition_works_from_its_step_only() {
        for step in Step::ALL {
            assert_eq!(at(step).step(), step);
            for (to, from) in [
                (Step::Initialized, Step::Created),
                (Step::Runnable, Step::Initialized),
            ] {
                let life = at(step);
                assert_eq!(life.advance(to), step.require(from), "{step:?} -> {to:?}");
                assert_eq!(life.step(), if step == from { to } else { step });
            }
            for to in [
                Step::Created,
                Step::KeyReleased,
                Step::Drained,
                Step::Poisoned,
            ] {
                assert!(at(step).advance(to).is_err());
            }
        }
    }

    #[test]
    fn poison_never_undoes_a_step_of_the_teardown() {
        for step in Step::ALL {
            let life = at(step);
            life.poison();
            let torn_down = matches!(step, Step::KeyReleased | Step::Drained);
            assert_eq!(life.step() == Step::Poisoned, !torn_down, "{step:?}");
        }
    }

    #[test]
    fn a_vm_whose_guest_is_away_passes_for_poisoned_until_it_is_back_or_torn_down() {
        for step in Step::ALL {
            let life = at(step);
            life.go_away();
            let goes = matches!(step, Step::Created | Step::Initialized | Step::Runnable);
            let seen = if goes { Step::Poisoned } else { step };
            assert_eq!((life.step(), life.step_at_home()), (seen, step), "{step:?}");
            assert_eq!(life.require(step).is_err(), goes);
            assert!(life.advance(Step::Initialized).is_err());
            life.come_back();
            assert_eq!(life.step(), step);

            life.go_away();
            life.poison();
            life.come_back();
            assert_eq!(
                life.step() == Step::Poisoned,
                goes || step == Step::Poisoned
            );
            let life = at(step);
            life.go_away();
            let _token = life.release_without_key();
            life.come_back();
            assert!(matches!(life.step(), Step::KeyReleased | Step::Drained));
        }
    }

    #[test]
    fn tokens_of_another_vm_of_the_same_number_are_refused_and_come_back() {
        let (a, b) = (at(Step::KeyReleased), at(Step::KeyReleased));
        let token = a.release_without_key();
        let Err((error, token)) = b.drain_without_private_pages(token) else {
            panic!("took the token of another VM")
        };
        assert_eq!(error, Error::Invalid(Field::Token, 1));
        let drained = a.drain_without_private_pages(token).unwrap();
        assert_eq!(
            b.check_drained(&drained),
            Err(Error::Invalid(Field::Token, 1))
        );
        assert_eq!(a.check_drained(&drained), Ok(()));
    }

    #[test]
    fn an_error_is_explained_by_the_failure_it_came_from_or_by_itself() {
        let life = at(Step::Runnable);
        let cause = |error| life.explain(error).cause;
        let why = |cause| Diagnosis::of(Tech::Vmx, VmId(1), Error::Firmware(7)).because(cause);
        assert_eq!(cause(Error::Poisoned), "");
        life.note(why("refused"));
        assert_eq!(cause(Error::Firmware(7)), "refused");
        assert_eq!(life.step(), Step::Runnable);
        life.poison_by(why("broken"));
        life.poison_by(why("broken again"));
        life.note_vcpu(Error::Poisoned, VcpuId(2));
        assert_eq!(life.step(), Step::Poisoned);
        let poisoned = life.explain(Error::Poisoned);
        assert_eq!((poisoned.cause, poisoned.vcpu), ("broken", Some(VcpuId(2))));
        let other = life.explain(Error::Busy);
        assert_eq!(other, Diagnosis::of(Tech::Vmx, VmId(1), Error::Busy));
    }

    #[test]
    fn a_lost_token_is_made_again_by_the_same_call() {
        for step in Step::ALL {
            let life = at(step);
            let _lost = life.release_without_key();
            let _lost = life.drain_without_private_pages(life.release_without_key());
            assert_eq!(life.step(), Step::Drained);
            let released = life.release_without_key();
            assert_eq!(life.step(), Step::Drained, "a drained VM stays drained");
            assert!(life.drain_without_private_pages(released).is_ok());
        }
    }
}
