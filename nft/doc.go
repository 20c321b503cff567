// Package nft keeps the nftables tables of a node, `table inet egret`, `table arp egret` and `table netdev egret`,
// equal to a State. They choose the egress IP of a pod's connections by conntrack marks, translate the source, and drop
// what would leave with another one. They also have the permits: sets of the egress IPs that the node may use, and an
// element with a timeout, which is the kernel's copy of the lease. When it ends, the kernel answers no ARP or NDP for
// these IPs and sends nothing with them, whatever the agent does.
//
// It owns these tables whole, whatever is in them, and nothing else in the kernel, but for `table inet egret-trace` for
// the seconds of a Trace. A chain, set, counter or rule that
// someone else puts into them is removed; other tables are never read nor written.
//
// Start with State (state.go), what is wanted; ruleset.go has the chains in the order of the hooks, block.go and
// overlay.go what passes between nodes, permit.go and renewal.go the permits. New opens the sockets, Observe reads the
// kernel, Diff compares, Apply writes.
//
// Rules and chains are constants, but for the links' names and MAC addresses in those that answer ARP, and the numbers
// of a State; what changes is set elements. Every rule carries a tag in its user data, a hash of its definition, and
// the kernel cannot change a rule in place. So tags in the right order mean the right rules, and a change costs one map
// element per pod, or per moved IP.
//
// Two guards have names of their own. The address guard (State.AddressGuard) drops packets to services of the node at
// an egress IP, and ARP and NDP for an egress IP without a permit. The chain guard, the last before a packet leaves,
// drops packets of egress connections whose source is no permitted egress IP (Tables.Guarded).
//
// The first-packet delay (State.FirstPacketDelay) drops the first packets of a pod address that is neither known as
// selected nor as unselected: by the time that they are retransmitted, the agent mostly knows the pod, and the
// connection gets the egress IP.
//
// Invariants:
//   - What is compared with a State was read from the kernel (Observe). It is read again as soon as somebody else has
//     changed one of these tables, and after wholeEvery; until then it is as it was read, with what Apply wrote since.
//     The chains of netdev go with their links, and are read each time.
//   - Every Apply is one transaction: a packet sees the tables before it or after it, nothing between, also while rules
//     are rewritten.
//   - What was not read whole is not read: Observe compares the ruleset's generation before and after, and the sets are
//     of a kind that the kernel does not rearrange by itself.
//   - A permit without an end is never written.
//   - Renewing permits commits nothing, and gives back nothing that a commit has taken (renewal.go).
//
// Expressions, types and constants are those of github.com/google/nftables. The messages around them are put together
// and read here, over github.com/mdlayher/netlink: the library's own connection makes maps whose marks nft prints, and
// takes, in reversed byte order; it does not say which part of a transaction was refused, and waits without end when a
// transaction is refused as a whole; its getters lose the errno and the mark of an interrupted dump, and fail on a set
// or rule in our table that they cannot parse.
//
// It does not decide what is in a State, announces nothing, keeps no routes, addresses or conntrack entries, and runs
// no goroutine of its own.
package nft
