//! Numbered commands, and their names.

/// Constants for the commands, and `command_name`. The text is what stands before a name in the kernel.
macro_rules! commands {
    ($before:literal; $($(#[$doc:meta])* $name:ident = $id:literal,)*) => {
        $($(#[$doc])* pub const $name: u32 = $id;)*

        #[doc = concat!("The name of a command after `", $before, "`.")]
        pub const fn command_name(id: u32) -> Option<&'static str> {
            match id {
                $($id => Some(stringify!($name)),)*
                _ => None,
            }
        }
    };
}

pub(crate) use commands;
