package routing

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// Hop is a next hop, with what is to be known to ask for it.
type Hop struct {
	egress.Hop
	// Source is the address of the node that its own packets there have.
	Source netip.Addr
}

// NextHop returns the neighbour that the kernel's rules and routes send packets with a mark to, for an address. It
// writes nothing, and asks nobody but the kernel, so Silent says nothing. That there is no route is no error, but the
// Fault.
func (r *Router) NextHop(to netip.Addr, mark egress.Mark) (Hop, error) {
	h := Hop{Hop: egress.Hop{To: to}}
	list, err := r.handle.RouteGetWithOptions(to.AsSlice(), &netlink.RouteGetOptions{Mark: uint32(mark)})
	for _, none := range []error{unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EINVAL} { // EINVAL: a blackhole
		if errors.Is(err, none) {
			h.Fault = err.Error()
			return h, nil
		}
	}
	if err != nil || len(list) == 0 {
		return h, fmt.Errorf("looking up the route to %s: %w", to, err)
	}
	route := list[0]
	h.Via, h.Source = to, addrOf(route.Src)
	if gateway := addrOf(route.Gw); gateway.IsValid() {
		h.Via = gateway
	}
	if via, ok := route.Via.(*netlink.Via); ok {
		h.Via = addrOf(via.Addr)
	}
	dev, err := r.handle.LinkByIndex(route.LinkIndex)
	if err != nil {
		return h, fmt.Errorf("reading the link to %s: %w", to, err)
	}
	a := dev.Attrs()
	h.Link, h.MTU = a.Name, a.MTU
	if route.MTU > 0 {
		h.MTU = min(h.MTU, route.MTU)
	}
	switch {
	case a.RawFlags&unix.IFF_UP == 0:
		h.Down = "down"
	case a.RawFlags&unix.IFF_RUNNING == 0:
		h.Down = "without a carrier"
	}
	if a.RawFlags&(unix.IFF_NOARP|unix.IFF_LOOPBACK|unix.IFF_POINTOPOINT) != 0 || len(a.HardwareAddr) != 6 {
		return h, nil // no neighbours are asked for there
	}
	h.Neighbour, err = r.neighbour(a.Index, h.Via)
	return h, err
}

// states are the names of what the kernel knows of a neighbour (uapi/linux/neighbour.h).
var states = map[int]string{
	netlink.NUD_INCOMPLETE: "INCOMPLETE", netlink.NUD_REACHABLE: "REACHABLE", netlink.NUD_STALE: "STALE", netlink.NUD_DELAY: "DELAY",
	netlink.NUD_PROBE: "PROBE", netlink.NUD_FAILED: "FAILED", netlink.NUD_NOARP: "NOARP", netlink.NUD_PERMANENT: "PERMANENT",
}

// neighbour returns the state of a neighbour on a link.
func (r *Router) neighbour(index int, ip netip.Addr) (string, error) {
	list, err := whole("neighbours", func() ([]netlink.Neigh, error) { return r.handle.NeighList(index, familyOf(ip).af) })
	for _, l := range list {
		if state := states[l.State]; state != "" && addrOf(l.IP) == ip {
			return state, err
		}
	}
	return egress.NoNeighbour, err
}

// LinkMTU returns the MTU of a link; 0: there is none of that name.
func (r *Router) LinkMTU(name string) (int, error) {
	dev, err := r.handle.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("reading link %s: %w", name, err)
	}
	return dev.Attrs().MTU, nil
}
