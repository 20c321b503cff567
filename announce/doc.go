// Package announce announces to the neighbours of a node, in a subnet, that an egress IP is on this node now: by
// gratuitous ARP and unsolicited neighbor advertisements. It also finds other hosts that use such an IP (Probe before
// it is used, Conflicts while it is announced).
//
// It owns nothing in the kernel; it opens a socket for as long as it sends and, for as long as there are IPv6
// addresses, one that listens, a member of their solicited-node groups.
//
// Each announcement of an IPv4 address is two broadcast frames, both with the address as sender and as target:
//
//   - an ARP request (RFC 5227, section 2.3, "ARP Announcement"), which every host that already knows the address takes
//     over: RFC 826 merges the sender's addresses into the table before it looks at the opcode;
//   - an ARP reply (RFC 5944, section 4.6, has both forms), for those that learn from replies only.
//
// Hosts that do not know the address learn nothing from either; switches learn the port from any frame.
//
// A neighbour that took over another MAC address less than a second ago may ignore a frame (Linux:
// neigh/<link>/locktime), and frames get lost, so a new address is announced several times, and then now and then.
//
// That of an IPv6 address is one advertisement to all nodes, which overrides what they know (RFC 4861, section 7.2.6).
//
// Invariants: no frame without a permit, which is asked for right before each frame, because a frame of a packet socket
// passes no nft chain that would hold it back (an advertisement does); nothing is sent for an address that was
// withdrawn.
//
// It answers no ARP request or solicitation: the kernel does (packages nft and vlan). And it does not decide what a
// conflict means: Probe and Conflicts only report it.
package announce
