// Package nft keeps the nftables tables of a node, `table inet egret`, `table arp egret` and `table netdev egret`, equal to a State, and
// holds in them the permits: the kernel's copy of the lease, which ends by itself.
//
// It owns these tables whole, whatever is in them, and nothing else in the kernel. A chain, set, counter or rule that someone
// else puts into them is removed; other tables are never read nor written.
//
// Rules and chains are constants (ruleset.go), but for the links' names and MAC addresses in those that answer ARP; what changes is set elements. Every rule carries a tag in its user data, a hash of its
// definition, and the kernel cannot change a rule in place. So tags in the right order mean the right rules, and one map element per
// pod, or per moved IP, is all that a change costs.
//
// Invariants:
//   - What is applied is read back from the kernel each time (Observe) and never remembered.
//   - Every Apply is one transaction: a packet sees the tables before it or after it, nothing between, also while rules are rewritten.
//   - What was not read whole is not read: Observe compares the ruleset's generation before and after, and the sets are of a kind
//     that the kernel does not rearrange by itself.
//   - A permit without an end is never written.
//   - Renewing permits commits nothing, and gives back nothing that a commit has taken (renewal.go).
//
// Expressions, types and constants are those of github.com/google/nftables. The messages around them are put together and read here,
// over github.com/mdlayher/netlink: the library's own connection makes maps whose marks nft prints, and takes, in reversed byte order;
// it does not say which part of a transaction was refused, and waits without end when a transaction is refused as a whole; its
// getters lose the errno and the mark of an interrupted dump, and fail on a set or rule in our table that they cannot parse.
//
// It does not decide what is in a State, announces nothing, keeps no routes, addresses or conntrack entries, and runs no goroutine
// of its own.
package nft
