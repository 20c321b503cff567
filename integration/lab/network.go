package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// The links: every host's own, the LAN's bridge, a node's bridge for its pods.
const (
	hostLink   = "eth0"
	bridgeLink = "br0"
	cniLink    = "cni0"
)

// host is an open network namespace.
type host struct {
	name string
	ns   netns.NsHandle
	nl   *netlink.Handle
}

// openHost opens a namespace of the lab; what is its name there, as "node-1".
func (l *Lab) openHost(what string) (*host, error) {
	ns, err := netns.GetFromPath(netnsPath(l.netns(what)))
	if err != nil {
		return nil, fmt.Errorf("opening network namespace %s: %w", l.netns(what), err)
	}
	nl, err := netlink.NewHandleAt(ns)
	if err != nil {
		ns.Close()
		return nil, fmt.Errorf("opening netlink in %s: %w", l.netns(what), err)
	}
	return &host{what, ns, nl}, nil
}

func (h *host) close() {
	h.nl.Close()
	h.ns.Close()
}

// newHost makes a namespace with lo up and the strict reverse path filter, and opens it. Links made later take the
// filter over.
func (l *Lab) newHost(what string, sysctls ...string) (*host, error) {
	if err := createNetns(l.netns(what)); err != nil {
		return nil, err
	}
	h, err := l.openHost(what)
	if err != nil {
		return nil, err
	}
	for _, link := range []string{"all", "default", "lo"} {
		sysctls = append(sysctls, "net/ipv4/conf/"+link+"/rp_filter=1")
		if link != "lo" && len(families()) > 1 {
			// Duplicate address detection of the link-local addresses would hold up IPv6 for two seconds.
			sysctls = append(sysctls, "net/ipv6/conf/"+link+"/accept_dad=0")
		}
	}
	if err := errors.Join(inNetns(l.netns(what), func() error { return setSysctls(sysctls) }), h.up("lo")); err != nil {
		h.close()
		return nil, fmt.Errorf("preparing %s: %w", what, err)
	}
	return h, nil
}

// setSysctls writes settings, path=value, in the namespace of the calling thread.
func setSysctls(settings []string) error {
	for _, s := range settings {
		path, value, _ := strings.Cut(s, "=")
		if err := os.WriteFile(filepath.Join("/proc/sys", path), []byte(value), 0); err != nil {
			return err
		}
	}
	return nil
}

func (h *host) up(link string) error {
	l, err := h.nl.LinkByName(link)
	if err == nil {
		err = h.nl.LinkSetUp(l)
	}
	if err != nil {
		return fmt.Errorf("setting %s of %s up: %w", link, h.name, err)
	}
	return nil
}

func (h *host) down(link string) error {
	l, err := h.nl.LinkByName(link)
	if err == nil {
		err = h.nl.LinkSetDown(l)
	}
	if err != nil {
		return fmt.Errorf("setting %s of %s down: %w", link, h.name, err)
	}
	return nil
}

func (h *host) bridge(name string, mac net.HardwareAddr) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = name, mac // a MAC of its own: else it is that of some port, and changes with them
	if err := h.nl.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return fmt.Errorf("adding bridge %s to %s: %w", name, h.name, err)
	}
	return h.up(name)
}

// plug connects eth0 of peer, new, to a new port of a bridge of h.
func (h *host) plug(bridge, port string, peer *host, mac net.HardwareAddr) error {
	br, err := h.nl.LinkByName(bridge)
	if err != nil {
		return fmt.Errorf("looking for %s of %s: %w", bridge, h.name, err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MasterIndex = port, br.Attrs().Index
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerNamespace, veth.PeerHardwareAddr = hostLink, netlink.NsFd(peer.ns), mac
	if err := h.nl.LinkAdd(veth); err != nil {
		return fmt.Errorf("adding link %s to %s: %w", port, h.name, err)
	}
	return errors.Join(h.up(port), peer.up(hostLink))
}

// unplug removes a port and the link at its other end. Nil when it is not there.
func (h *host) unplug(port string) error {
	l, err := h.nl.LinkByName(port)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err == nil {
		err = h.nl.LinkDel(l)
	}
	if err != nil {
		return fmt.Errorf("removing link %s of %s: %w", port, h.name, err)
	}
	return nil
}

// address adds an address at once, without duplicate address detection: nothing else in the lab has it.
func (h *host) address(link string, p netip.Prefix) error {
	l, err := h.nl.LinkByName(link)
	if err == nil {
		err = h.nl.AddrAdd(l, &netlink.Addr{IPNet: ipNet(p), Flags: unix.IFA_F_NODAD})
	}
	if err != nil {
		return fmt.Errorf("adding address %v to %s of %s: %w", p, link, h.name, err)
	}
	return nil
}

// route adds a route through eth0.
func (h *host) route(to netip.Prefix, via netip.Addr) error {
	l, err := h.nl.LinkByName(hostLink)
	if err == nil {
		err = h.nl.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipNet(to), Gw: via.AsSlice()})
	}
	if err != nil {
		return fmt.Errorf("adding route %v via %v to %s: %w", to, via, h.name, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func defaultRoute(like netip.Addr) netip.Prefix {
	p, _ := like.Prefix(0) // 0 bits fit every valid address
	return p
}

func portName(what string) string { return "to-" + what }

// buildLAN makes the bridge and the hosts that are no nodes.
func (l *Lab) buildLAN() error {
	lan, err := l.newHost("lan")
	if err != nil {
		return err
	}
	defer lan.close()
	if err := lan.bridge(bridgeLink, mac(netip.AddrFrom4([4]byte{10, 10, 0, 0}))); err != nil {
		return err
	}
	for _, lh := range l.hosts() {
		h, err := l.newHost(lh.name)
		if err != nil {
			return err
		}
		defer h.close()
		if err := l.join(lan, h, lh.number); err != nil {
			return err
		}
	}
	return l.at("outside", func(h *host) (err error) {
		for _, f := range families() {
			err = errors.Join(err, h.address("lo", netip.PrefixFrom(f.outside, f.hostBits)))
		}
		return err
	})
}

// join plugs a host into the LAN and gives it its addresses there.
func (l *Lab) join(lan, h *host, number int) error {
	if err := lan.plug(bridgeLink, portName(h.name), h, mac(families()[0].host(number))); err != nil {
		return err
	}
	for _, f := range families() {
		if err := h.address(hostLink, f.onLAN(number)); err != nil {
			return err
		}
	}
	return nil
}

// buildNode makes node n as it is after a boot and its CNI's start.
func (l *Lab) buildNode(n int) error {
	lan, err := l.openHost("lan")
	if err != nil {
		return err
	}
	defer lan.close()
	var sysctls []string
	for _, f := range families() {
		sysctls = append(sysctls, f.sysctl+"=1")
	}
	h, err := l.newHost(NodeName(n), sysctls...)
	if err != nil {
		return err
	}
	defer h.close()
	if err := l.join(lan, h, nodeHost+n); err != nil {
		return err
	}
	if l.cfg.flannel() {
		return l.routes(h, n) // the rest is made by flannel
	}
	if err := h.bridge(cniLink, mac(families()[0].podIP(n, 1))); err != nil {
		return err
	}
	for _, f := range families() {
		if err := h.address(cniLink, f.onCNI(n, 1)); err != nil {
			return err
		}
	}
	if err := l.routes(h, n); err != nil {
		return err
	}
	return addMasquerade(h.ns)
}

// routes adds the routes of node n through the LAN: to the outside host, and to the other nodes' pods where flannel
// does not.
func (l *Lab) routes(h *host, n int) error {
	for _, f := range families() {
		if err := h.route(defaultRoute(f.outside), f.host(outsideHost)); err != nil {
			return err
		}
		for _, peer := range l.nodes() {
			if peer == n || l.cfg.flannel() {
				continue
			}
			if err := h.route(f.podCIDR(peer), f.node(peer)); err != nil {
				return err
			}
		}
	}
	return nil
}

func podPort(p Pod) string { return fmt.Sprintf("pod%d", p.Number) }

// attachPod connects a pod's namespace, which has no eth0, to its node.
func (l *Lab) attachPod(p Pod) error {
	n, err := l.NodeNumber(p.Node)
	if err != nil {
		return err
	}
	node, err := l.openHost(p.Node)
	if err != nil {
		return err
	}
	defer node.close()
	pod, err := l.openHost(podNetns(p.Name))
	if err != nil {
		return err
	}
	defer pod.close()
	if err := node.plug(cniLink, podPort(p), pod, mac(families()[0].podIP(n, p.Number))); err != nil {
		return err
	}
	for _, f := range families() {
		if err := pod.address(hostLink, f.onCNI(n, p.Number)); err != nil {
			return err
		}
		if err := pod.route(defaultRoute(f.outside), f.podIP(n, 1)); err != nil {
			return err
		}
	}
	return nil
}

// removeHost removes a namespace and, first and at once, its links: the kernel takes its time with a namespace, and
// until then the other ends of its links are there. Nil when there is none.
func (l *Lab) removeHost(what string) error {
	h, err := l.openHost(what)
	if err == nil {
		links, lerr := h.nl.LinkList()
		for _, link := range links {
			if t := link.Type(); t == "veth" || t == "bridge" {
				lerr = errors.Join(lerr, h.unplug(link.Attrs().Name))
			}
		}
		h.close()
		if lerr != nil {
			err = lerr
		}
	} else if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.EINVAL) { // EINVAL: the file of a namespace that is not mounted
		err = nil
	}
	return errors.Join(err, deleteNetns(l.netns(what)))
}
