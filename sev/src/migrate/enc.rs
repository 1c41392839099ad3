//! Move and copy of an encryption context in two halves (Linux `KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM`
//! and `KVM_CAP_VM_COPY_ENC_CONTEXT_FROM`).
//!
//! The value between the halves names the source, whose vCPUs stand still meanwhile; the context
//! stays with it until the other VM takes it in one step. So dropping the value, or destroying
//! either VM in between, loses nothing.

use alloc::boxed::Box;
use alloc::sync::Arc;

use kvm_ops::{EncContext, EncTransfer, Error, Host, Result, Step, Tech};

use super::bond::{Home, Tenure};
use super::transfer::{claim_both, halt, mirror, reopen, take_over, unfit};
use crate::SevVm;
use crate::shared::Shared;

/// What travels in an [`EncContext`].
struct Parcel<H: Host> {
    source: Arc<Shared<H>>,
    /// Whether the source stands still for it.
    halted: bool,
}

impl<H: Host> Drop for Parcel<H> {
    /// Not adopted: the source goes on as it was.
    fn drop(&mut self) {
        if !self.halted {
            return;
        }
        let _claimed = self.source.claim_waiting();
        let mut bond = self.source.bond();
        if let Tenure::Released { step, mirror_of } = &bond.tenure {
            let step = *step;
            bond.tenure = match mirror_of {
                Some(home) => Tenure::Mirror(Arc::clone(home)),
                None => Tenure::Owner,
            };
            drop(bond);
            reopen(&self.source, step);
        }
    }
}

impl<H: Host> SevVm<H> {
    /// The source's half.
    pub(crate) fn release(&mut self, transfer: EncTransfer) -> Result<EncContext> {
        let source = &self.shared;
        let _claimed = source.claim.claim()?;
        if source.tech == Tech::SevSnp {
            return Err(unfit(source));
        }
        let mirror_of = match &source.bond().tenure {
            Tenure::Owner => None,
            Tenure::Mirror(home) => Some(Arc::clone(home)),
            // The token must be traded or withdrawn first.
            Tenure::Staged { .. } => return Err(Error::Busy),
            Tenure::Released { .. } | Tenure::Given(_) | Tenure::Moved => {
                return Err(Error::Poisoned);
            }
        };
        let step = source.step();
        match step {
            Step::Poisoned => return Err(Error::Poisoned),
            Step::Initialized | Step::Runnable => {}
            _ => return Err(unfit(source)),
        }
        let halted = match transfer {
            EncTransfer::Copy if mirror_of.is_some() => return Err(unfit(source)),
            EncTransfer::Copy => false,
            EncTransfer::Move => {
                halt(source);
                source.bond().tenure = Tenure::Released { step, mirror_of };
                true
            }
        };
        Ok(EncContext {
            tech: source.tech,
            source: source.id,
            transfer,
            state: Box::new(Parcel {
                source: Arc::clone(source),
                halted,
            }),
        })
    }

    /// The destination's half. A context that comes back to its source is taken back.
    pub(crate) fn adopt(&mut self, context: EncContext) -> Result<(), (Error, EncContext)> {
        let to = &self.shared;
        let adopted = match context.state.downcast_ref::<Parcel<H>>() {
            None => Err(unfit(to)),
            Some(parcel) if parcel.halted && Arc::ptr_eq(&parcel.source, to) => Ok(()),
            Some(parcel) => match context.transfer {
                EncTransfer::Move => adopt_moved(to, &parcel.source),
                EncTransfer::Copy => adopt_mirrored(to, &parcel.source),
            },
        };
        // The parcel's drop puts a source right that still is one.
        adopted.map_err(|error| (error, context))
    }
}

fn adopt_moved<H: Host>(to: &Arc<Shared<H>>, from: &Arc<Shared<H>>) -> Result<()> {
    let _claims = claim_both(to, from)?;
    let (step, mirror_of): (Step, Option<Arc<Home<H>>>) = match &from.bond().tenure {
        Tenure::Released { step, mirror_of } => (*step, mirror_of.clone()),
        _ => return Err(unfit(from)),
    };
    take_over(to, from, step, |_| Ok(()))?;
    from.bond().tenure = Tenure::Moved;
    if let Some(home) = mirror_of {
        home.mirror_moved(from, to);
        to.bond().tenure = Tenure::Mirror(home);
    }
    Ok(())
}

fn adopt_mirrored<H: Host>(to: &Arc<Shared<H>>, from: &Arc<Shared<H>>) -> Result<()> {
    let _claims = claim_both(to, from)?;
    if !matches!(from.bond().tenure, Tenure::Owner) {
        return Err(unfit(from));
    }
    from.step().require_live()?;
    mirror(to, from)
}
