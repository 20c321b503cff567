package routing

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// groups are the multicast groups of rtnetlink that tell of what this package and package vlan read. The library joins
// groups by bit mask, which ends at 32.
var groups = []uint{
	unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH,
	unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
	unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
	unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
	unix.RTNLGRP_IPV4_NETCONF, // rp_filter
	unix.RTNLGRP_IPV6_NETCONF, // proxy_ndp
}

const (
	// settle is for how long after an event the kernel may still be at it: it tells of an address that goes before it
	// takes away, silently, the IPv4 routes that go with it (linux: __inet_del_ifa), and of a link likewise.
	settle = 200 * time.Millisecond
	// wholeEvery is how often everything is read all the same: should the kernel not be as its events say, that is
	// mended then.
	wholeEvery = 5 * time.Minute
)

// Watcher knows until when what was read of links, addresses, rules, routes, neighbours and FDB entries is so still.
// The zero Watcher is ready, and holds nothing for so until its Watch listens. Its methods may be called from any
// goroutine.
type Watcher struct {
	mu      sync.Mutex // guards what follows
	running bool
	events  uint64    // how many there were, the lost ones counted as one
	last    time.Time // when the last one came
}

// Moment is when something was read, as a Watcher knows it.
type Moment struct {
	events uint64
	at     time.Time
}

// Now returns the Moment that is to be taken before a read.
func (w *Watcher) Now() Moment {
	w.mu.Lock()
	defer w.mu.Unlock()
	return Moment{w.events, time.Now()}
}

// Holds reports whether what was read at a Moment is so still, as far as events tell: there was none since, nor right
// before it, nor is it minutes ago.
func (w *Watcher) Holds(m Moment) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.running && m.events == w.events && m.at.Sub(w.last) >= settle && time.Since(m.at) < wholeEvery
}

// Due returns when what was read at a Moment has to be read again by time alone: soon where an event was right before
// it, else in some minutes.
func (w *Watcher) Due(m Moment) time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	if done := w.last.Add(settle); m.at.Before(done) {
		return done
	}
	return m.at.Add(wholeEvery)
}

// note takes in that there was an event, or that Watch begins or ends: what came before it begins is not known.
func (w *Watcher) note(running bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.running, w.last = running, time.Now()
	w.events++
}

// Watch calls changed once it listens, so that nothing before is missed, and then after every change, by whomever, of a
// link, of an address, of a rule or route of ours, and of a neighbour or FDB entry of the overlay link, in the network
// namespace of the calling thread. When the kernel had to drop events, that counts as a change. Watch returns nil when
// ctx ends. changed must not block. Only one Watch of a Watcher may run at a time.
func (w *Watcher) Watch(ctx context.Context, changed func()) error {
	s, err := nl.Subscribe(unix.NETLINK_ROUTE, groups...)
	if err != nil {
		return fmt.Errorf("watching links and routes: %w", err)
	}
	defer s.Close()
	stop := context.AfterFunc(ctx, s.Close) // ends the blocked read
	defer stop()

	var own filter
	own.lookUp()
	lossy := false // the kernel drops events: it does until all that waits is read, and says so once, before all that
	w.note(true)
	defer w.note(false)
	changed()
	for {
		msgs, _, err := s.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			lossy = true
			own.lookUp() // it may have been made anew
			w.note(true)
			changed()
			continue
		case err != nil:
			return fmt.Errorf("watching links and routes: %w", err)
		}
		matter := lossy // also with the last of what waits: until it was taken, events were dropped
		lossy = lossy && waits(s.GetFd())
		for _, m := range msgs {
			matter = own.matters(m) || matter
		}
		if matter {
			w.note(true)
			changed()
		}
	}
}

// waits reports whether there is more to be read from a socket; where that cannot be asked, there is.
func waits(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	_, err := unix.Poll(fds, 0)
	return err != nil || fds[0].Revents&unix.POLLIN != 0
}

// filter is what one Watch knows of which events are about ours.
type filter struct {
	overlay int // index of the overlay link; 0: there is none, and an event will tell of it; anyLink: it is not known
}

const anyLink = -1

// lookUp asks the kernel for the overlay link.
func (f *filter) lookUp() {
	switch dev, err := netlink.LinkByName(egress.OverlayLink); {
	case err == nil:
		f.overlay = dev.Attrs().Index
	case errors.As(err, new(netlink.LinkNotFoundError)):
		f.overlay = 0
	default:
		f.overlay = anyLink
	}
}

// matters reports whether an event is about something that we read. What cannot be read does.
func (f *filter) matters(m syscall.NetlinkMessage) bool {
	switch m.Header.Type {
	case unix.RTM_NEWLINK:
		if len(m.Data) < unix.SizeofIfInfomsg {
			return true
		}
		attrs, err := nl.ParseRouteAttrAsMap(m.Data[unix.SizeofIfInfomsg:])
		if err == nil && nl.BytesToString(attrs[unix.IFLA_IFNAME].Value) == egress.OverlayLink {
			f.overlay = int(nl.DeserializeIfInfomsg(m.Data).Index)
		}
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		return routeMatters(m)
	case unix.RTM_NEWRULE, unix.RTM_DELRULE:
		return ruleMatters(m)
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		n, err := netlink.NeighDeserialize(m.Data)
		return err != nil || n.LinkIndex == f.overlay || f.overlay == anyLink
	}
	return true
}

// fraProtocol is FRA_PROTOCOL of uapi/linux/fib_rules.h.
const fraProtocol = 21

// routeMatters reports whether an event is about a route of our protocol, one in one of our tables, or one that makes
// an address local. Of a route of ours that another program's replaces the kernel tells no more than that one.
func routeMatters(m syscall.NetlinkMessage) bool {
	if len(m.Data) < unix.SizeofRtMsg {
		return true
	}
	r := nl.DeserializeRtMsg(m.Data)
	if r.Table != unix.RT_TABLE_COMPAT { // else the number is too large for the header
		return r.Protocol == egress.RouteProtocol || r.Table == unix.RT_TABLE_LOCAL && r.Type == unix.RTN_LOCAL
	}
	attrs, err := nl.ParseRouteAttrAsMap(m.Data[unix.SizeofRtMsg:])
	t := attrs[unix.RTA_TABLE].Value
	if err != nil || len(t) != 4 {
		return true
	}
	table := int(nl.NativeEndian().Uint32(t))
	return table >= egress.FirstTable && table <= maxTable
}

// ruleMatters reports whether an event is about a rule of our protocol, which is among the attributes. The header has
// the size of a route's.
func ruleMatters(m syscall.NetlinkMessage) bool {
	if len(m.Data) < unix.SizeofRtMsg {
		return true
	}
	attrs, err := nl.ParseRouteAttrAsMap(m.Data[unix.SizeofRtMsg:])
	p := attrs[fraProtocol].Value
	return err != nil || len(p) == 1 && p[0] == egress.RouteProtocol
}
