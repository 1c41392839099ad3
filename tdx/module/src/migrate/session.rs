//! The keys of a migration session.

use crate::call::Leaf;
use crate::faults::Machine;
use crate::status::Code;
use crate::td::Migration;

impl Migration {
    /// Begins a session: the keys and the version that the migration TD has agreed on come into use, and the TD
    /// gets a new encryption key for a session to come.
    ///
    /// # Errors
    /// No decryption key was written since the last session; no entropy, with the old encryption key already in
    /// use.
    pub(super) fn begin_session(&mut self, machine: &Machine, rdseed_tries: u32) -> Leaf {
        if !self.dec_key_set {
            return Err(Code::MIGRATION_DECRYPTION_KEY_NOT_SET.status());
        }
        self.enc_working_key = self.enc_key;
        self.enc_key = machine
            .rdseed_four(rdseed_tries)
            .ok_or(Code::RND_NO_ENTROPY.status())?;
        self.dec_working_key = self.dec_key;
        self.dec_key_set = false;
        self.working_version = self.version;
        self.mig_epoch = 0;
        self.total_mb_count = 0;
        Ok(())
    }
}
