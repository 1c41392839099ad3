//! `#[dispatchable]`: lets enum_dispatch serve an ordinary trait in crates that did not declare it.
//!
//! enum_dispatch links a trait and an enum by name within one crate, because it keeps the trait's
//! tokens in a table of the running compiler. For a trait `T` the attribute leaves the trait as it
//! is and adds a hidden macro `__dispatch_T`. In the crate that declares an enum, that macro shows
//! enum_dispatch a copy of the enum and of the trait's signatures, which vanish after it has read
//! them; the `impl` that it writes names the real trait and the real enum.
#![forbid(unsafe_code)]

use proc_macro::TokenStream;
use quote::{format_ident, quote};
use syn::visit_mut::{self, VisitMut};
use syn::{Error, Ident, ItemTrait, Path, TraitItem, parse_macro_input, parse_quote};

/// Adds the hidden macro `__dispatch_Name` to the trait `Name`. For traits of `kvm-ops-core`.
///
/// A dispatchable trait has methods with a receiver only. Paths in signatures start at the crate's
/// root, or name the prelude or the method's own parameters; other paths are a compile error here.
#[proc_macro_attribute]
pub fn dispatchable(_: TokenStream, item: TokenStream) -> TokenStream {
    let original = proc_macro2::TokenStream::from(item.clone());
    let mut copy = parse_macro_input!(item as ItemTrait);
    if let Err(error) = keep_signatures(&mut copy) {
        let error = error.to_compile_error();
        return quote!(#original #error).into();
    }
    let (name, signatures) = (&copy.ident, &copy.items);
    let hidden = format_ident!("__dispatch_{name}");
    quote! {
        #original

        // A path that is not found from the root is an error here, not where an enum is declared.
        const _: () = {
            use crate::__root;
            #[allow(dead_code)]
            trait Check: Sized { #(#signatures)* }
        };

        #[doc(hidden)]
        #[macro_export]
        macro_rules! #hidden {
            ([$($cfg:tt)*] $Enum:ident $(<$($T:ident),+>)?, $($declaration:tt)*) => {
                $($cfg)*
                const _: () = {
                    use $crate::{#name, __root, __vanish};
                    // In this order: enum_dispatch reads both copies, then they vanish.
                    #[$crate::enum_dispatch]
                    #[__vanish]
                    $($declaration)*
                    #[$crate::enum_dispatch($Enum $(<$($T),+>)?)]
                    #[__vanish]
                    #copy
                };
            };
        }
    }
    .into()
}

/// Leaves nothing of the item. (`#[cfg(any())]` would be expanded before enum_dispatch.)
#[doc(hidden)]
#[proc_macro_attribute]
pub fn __vanish(_: TokenStream, _: TokenStream) -> TokenStream {
    TokenStream::new()
}

/// Reduces a trait to what enum_dispatch reads: names and signatures.
fn keep_signatures(copy: &mut ItemTrait) -> syn::Result<()> {
    copy.attrs.clear();
    copy.colon_token = None;
    copy.supertraits.clear();
    for item in &mut copy.items {
        let TraitItem::Fn(method) = item else {
            return Err(Error::new_spanned(
                item,
                "a dispatchable trait has methods only",
            ));
        };
        if method.sig.receiver().is_none() {
            return Err(Error::new_spanned(
                &method.sig,
                "no variant can be chosen without `self`",
            ));
        }
        method.attrs.retain(|attr| attr.path().is_ident("cfg"));
        method.default = None;
        method.semi_token = Some(Default::default());
        let own = method
            .sig
            .generics
            .type_params()
            .map(|param| param.ident.clone())
            .collect();
        FromRoot { own }.visit_signature_mut(&mut method.sig);
    }
    Ok(())
}

/// Names that mean the same in every crate.
const PRELUDE: &str = "Self Option Sized Send Sync Copy Clone From Into AsRef Iterator Fn FnMut \
    FnOnce bool char str u8 u16 u32 u64 u128 usize i8 i16 i32 i64 i128 isize";

/// Writes `__root::` before each path that does not mean the same everywhere.
struct FromRoot {
    own: Vec<Ident>,
}

impl VisitMut for FromRoot {
    fn visit_path_mut(&mut self, path: &mut Path) {
        visit_mut::visit_path_mut(self, path);
        let Some(first) = path.segments.first().map(|segment| &segment.ident) else {
            return;
        };
        let known =
            self.own.contains(first) || PRELUDE.split_whitespace().any(|name| first == name);
        if path.leading_colon.is_none() && !known {
            *path = parse_quote!(__root::#path);
        }
    }
}
