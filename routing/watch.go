package routing

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// groups are the multicast groups of rtnetlink that tell of what this package and package vlan read. The library joins groups by bit
// mask, which ends at 32.
var groups = []uint{
	unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH,
	unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
	unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
	unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
	unix.RTNLGRP_IPV4_NETCONF, // rp_filter
	unix.RTNLGRP_IPV6_NETCONF, // proxy_ndp
}

// Watch calls changed once it listens, so that nothing before is missed, and then after every change, by whomever, of a link, of an
// address, of a rule or route of ours, and of a neighbour or FDB entry of the overlay link, in the network namespace of the calling
// thread. When the kernel had to drop events, that counts as a change. Watch returns nil when ctx ends. changed must not block.
func Watch(ctx context.Context, changed func()) error {
	s, err := nl.Subscribe(unix.NETLINK_ROUTE, groups...)
	if err != nil {
		return fmt.Errorf("watching links and routes: %w", err)
	}
	defer s.Close()
	stop := context.AfterFunc(ctx, s.Close) // ends the blocked read
	defer stop()

	var w watcher
	if dev, err := netlink.LinkByName(egress.OverlayLink); err == nil {
		w.overlay = dev.Attrs().Index
	} // else an event will tell its index
	changed()
	for {
		msgs, _, err := s.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			changed()
			continue
		case err != nil:
			return fmt.Errorf("watching links and routes: %w", err)
		}
		matter := false
		for _, m := range msgs {
			matter = w.matters(m) || matter
		}
		if matter {
			changed()
		}
	}
}

// watcher is what one Watch knows.
type watcher struct {
	overlay int // index of the overlay link
}

// matters reports whether an event is about something that we read. What cannot be read does.
func (w *watcher) matters(m syscall.NetlinkMessage) bool {
	switch m.Header.Type {
	case unix.RTM_NEWLINK:
		if len(m.Data) < unix.SizeofIfInfomsg {
			return true
		}
		attrs, err := nl.ParseRouteAttrAsMap(m.Data[unix.SizeofIfInfomsg:])
		if err == nil && nl.BytesToString(attrs[unix.IFLA_IFNAME].Value) == egress.OverlayLink {
			w.overlay = int(nl.DeserializeIfInfomsg(m.Data).Index)
		}
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE, unix.RTM_NEWRULE, unix.RTM_DELRULE:
		return routeMatters(m)
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		n, err := netlink.NeighDeserialize(m.Data)
		return err != nil || n.LinkIndex == w.overlay
	}
	return true
}

// fraProtocol is FRA_PROTOCOL of uapi/linux/fib_rules.h.
const fraProtocol = 21

// routeMatters reports whether an event is about a route or rule of our protocol, or about a route that makes an address local. The headers of
// both have the same size; a route's has
// the protocol in it, a rule's is among the attributes.
func routeMatters(m syscall.NetlinkMessage) bool {
	if len(m.Data) < unix.SizeofRtMsg {
		return true
	}
	if m.Header.Type == unix.RTM_NEWROUTE || m.Header.Type == unix.RTM_DELROUTE {
		r := nl.DeserializeRtMsg(m.Data)
		return r.Protocol == egress.RouteProtocol || r.Table == unix.RT_TABLE_LOCAL && r.Type == unix.RTN_LOCAL
	}
	attrs, err := nl.ParseRouteAttrAsMap(m.Data[unix.SizeofRtMsg:])
	if err != nil {
		return true
	}
	p := attrs[fraProtocol].Value
	return len(p) == 1 && p[0] == egress.RouteProtocol
}
