// Package fastpath forwards, by programs of eBPF, most of what package nft's tables would have a gateway forward, and
// wraps and unwraps packets of the overlay, at less CPU time than the tables and the kernel's VXLAN take for it.
//
// It owns three programs (tcx) at two links, and their maps. Nothing is pinned: with the process that made them, also
// when it is killed, they are gone, and the tables do it all. fast.c has
//
//   - from_overlay, at the overlay link's ingress, and from_uplink, at the uplink's: a packet with an egress IP and a
//     port of the block of the node that sent it leaves by the uplink;
//   - from_uplink: a packet for an egress IP and a port of another node's block goes to that node by the overlay; other
//     packets of the overlay go into the overlay link without the tables having seen the outer packet;
//   - to_overlay, at the overlay link's egress: what the tables send to a node is wrapped, and leaves by the uplink.
//
// Start with State (state.go), what is wanted; path.go loads the programs, and has Observe, Diff and Apply; permit.go
// the permits.
//
// # Why nothing passes that the tables would not let pass
//
// The tables stay as they are, and whole: a program is a short cut for a packet that they would accept, and leaves
// every other one to them as it came, to be dropped, counted or answered there. It takes a packet only if all of this
// holds:
//
//   - It came in as a frame for this host, by the uplink itself (no VLAN on it) or the overlay link. It is IPv4, TCP or
//     UDP, in no fragments, without options, with a right checksum, and with hops to go. A SYN is not taken (the tables
//     clamp its MSS).
//   - What comes by the overlay is of a node: its underlay address and the MAC address in its frame belong together,
//     and the way back to it is the uplink (the tables' overlay_from). Where the kernel took the outer header off, the
//     tables saw to that.
//   - What leaves has a source of which that node has the port (the tables' origin4), and the egress IP has a permit.
//   - What comes for a block has a source to which the way back is the uplink, as rp_filter=1 asks for.
//   - The route leads to the uplink, the packet fits there, and the next hop is known. The route is looked up for each
//     packet (bpf_fib_lookup), by the node's own rules, without a mark. It goes to no group and no other address that
//     the kernel forwards nothing to, though its routes have a way there.
//
// A permit is an end on the kernel's clock, of all time since boot. A process that stands still lets it pass, and one
// that writes late writes an end that is over. Whoever keeps the permits writes those of the tables first and these
// after, and takes them back in the other order, so that these are never the later ones.
//
// # What passes by
//
// Where a program takes a packet, no other sees it: no firewall of the node in iptables or nftables, no IPsec policy,
// no packet trace of nftables (Pause), and none of the programs behind it on the link. That is why it has to be asked
// for.
//
// It does not do IPv6, IPv4 over an underlay of IPv6, subnets with a VLAN, egress IPs with a limit, fragments, ICMP and
// other protocols, nor anything that needs conntrack, as what a pod's own node translates: that is the tables'.
package fastpath

//go:generate go run generate.go
