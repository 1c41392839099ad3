//! Accounts that pay for memory keys, as the misc cgroup in Linux (`misc.max`, resources `sev` and
//! `sev_es`).

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU32, Ordering};

use kvm_ops::{Error, Result, Tech};

/// An account that pays for the keys of VMs, with a limit for each kind.
///
/// A key is charged from its lease until it is given back, to one account at any time. The charge
/// keeps its kind, so a moved SEV-ES guest is never counted as a SEV guest on either side.
#[derive(Debug)]
pub struct KeyAccount {
    sev: Counter,
    /// SEV-ES and SNP, which share their ASIDs.
    sev_es: Counter,
}

#[derive(Debug)]
struct Counter {
    limit: u32,
    used: AtomicU32,
}

impl KeyAccount {
    /// An account with these limits.
    pub const fn new(sev: u32, sev_es: u32) -> Self {
        const fn counter(limit: u32) -> Counter {
            Counter {
                limit,
                used: AtomicU32::new(0),
            }
        }
        Self {
            sev: counter(sev),
            sev_es: counter(sev_es),
        }
    }

    fn counter(&self, tech: Tech) -> &Counter {
        match tech {
            Tech::Sev => &self.sev,
            _ => &self.sev_es,
        }
    }

    /// The number of keys of that kind that it pays for.
    pub fn used(&self, tech: Tech) -> u32 {
        self.counter(tech).used.load(Ordering::Acquire)
    }

    /// Pays for one more key.
    pub(crate) fn charge(self: &Arc<Self>, tech: Tech) -> Result<Charge> {
        let counter = self.counter(tech);
        let more = counter
            .used
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| {
                (used < counter.limit).then_some(used + 1)
            });
        match more {
            Ok(_) => Ok(Charge {
                account: Arc::clone(self),
                tech,
            }),
            Err(_) => Err(Error::Busy),
        }
    }
}

/// One key that an account pays for. Dropping it ends that.
#[derive(Debug)]
pub(crate) struct Charge {
    account: Arc<KeyAccount>,
    tech: Tech,
}

impl Charge {
    /// True if that account pays.
    pub(crate) fn is_to(&self, account: &Arc<KeyAccount>) -> bool {
        Arc::ptr_eq(&self.account, account)
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let used = &self.account.counter(self.tech).used;
        used.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_its_limit_and_is_given_back_as_what_it_was() {
        let account = Arc::new(KeyAccount::new(1, 2));
        let sev = account.charge(Tech::Sev).unwrap();
        assert_eq!(account.charge(Tech::Sev).unwrap_err(), Error::Busy);
        let es = account.charge(Tech::SevEs).unwrap();
        let snp = account.charge(Tech::SevSnp).unwrap();
        assert_eq!(account.charge(Tech::SevEs).unwrap_err(), Error::Busy);
        drop((es, snp));
        assert_eq!((account.used(Tech::Sev), account.used(Tech::SevEs)), (1, 0));
        drop(sev);
        assert_eq!(account.used(Tech::Sev), 0);
    }
}
