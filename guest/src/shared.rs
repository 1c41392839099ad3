//! Memory that the host shares.

/// Shared memory of a call, as the kernel maps it. The host reads and writes it at any time.
pub trait SharedBuffer {
    /// Copies from `offset` on. The offsets and lengths that are asked for lie in the buffer.
    fn read(&mut self, offset: usize, bytes: &mut [u8]);
    /// Copies to `offset`.
    fn write(&mut self, offset: usize, bytes: &[u8]);
}
