// Package vlan carries the addresses of the egress IPs that a node hosts: those of the default subnet on the link
// egret0, and those of a pool with a subnet of its own on the VLAN link of that.
//
// It owns, in the network namespace of who called New, the link egret0 and the links egret.<VLAN id>, with all the
// addresses on them; and on other links the neighbour proxies of protocol 94, the addresses with the flag autojoin that
// are groups of solicited nodes, and proxy_ndp and proxy_delay while there are such proxies (neighbor.go): the kernel
// answers by them for IPv6 addresses that another link has. Other addresses elsewhere are never touched, and neither is
// a link of the name that is of another kind: that is an error that names it.
//
// egret0 is a dummy, or, where the kernel has none, a bridge without ports, and it is always down. The addresses serve
// all the same: the kernel makes the local route of an address whether its link is up or not, and an address is the
// node's, not the link's, so ARP requests for it are answered on every link (arp_ignore=0,
// Documentation/networking/ip-sysctl.rst). Being down, it has no connected route, sends nothing, and takes part in no
// protocol. kube-proxy's kube-ipvs0 is the same, for the same reasons.
//
// Invariants: nothing is remembered, Diff compares what the kernel says with what is wanted; a read that the kernel
// interrupted is repeated, never taken for whole.
//
// It does not decide when an address may be there (package agent first has the address guard of package nft in place),
// and announces nothing (package announce).
package vlan
