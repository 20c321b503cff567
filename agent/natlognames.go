package agent

import (
	"cmp"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/natlog"
)

// named is what connections of one pod by one egress IP have in common.
type named struct {
	egress          string
	ip              netip.Addr // the egress IP
	namespace, name string     // of the pod
	node            string     // of the pod, where it is another one
}

// names are the names of what connections have numbers and addresses of. It is safe for concurrent use.
type names struct {
	mu    sync.Mutex // guards what follows
	last  *egress.Snapshot
	pods  map[netip.Addr]podName
	ids   map[egress.ID]egressName
	nodes map[int]string // by index
	known map[namedKey]*named
}

type namedKey struct {
	source netip.Addr
	id     egress.ID
}

type podName struct {
	namespace, name string
	egresses        []string
	gone            time.Time // zero: it is there
}

type egressName struct {
	name string
	ip   netip.Addr
	of   *egress.Snapshot // that it was looked up in
}

func newNames() *names {
	return &names{pods: map[netip.Addr]podName{}, ids: map[egress.ID]egressName{}}
}

// follow takes over a snapshot.
func (n *names) follow(s *egress.Snapshot, now time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if s == n.last || s == nil {
		return
	}
	n.last, n.nodes = s, nil
	n.known = map[namedKey]*named{}
	there := make(map[netip.Addr]podName, len(n.pods))
	for name, m := range s.ByNode {
		for _, p := range m.Pods {
			namespace, pod, _ := strings.Cut(p.Pod, "/")
			for _, ip := range p.IPs {
				is := podName{namespace: namespace, name: pod, egresses: there[ip].egresses}
				if name != egress.Unselected {
					is.egresses = append(is.egresses, name)
				}
				there[ip] = is
			}
		}
	}
	for ip, p := range n.pods {
		if _, ok := there[ip]; ok {
			continue
		}
		if p.gone.IsZero() {
			p.gone = now
		}
		if now.Sub(p.gone) < formerFor {
			there[ip] = p
		}
	}
	n.pods = there
}

// egressOf returns the name and the IP of an id; those that it had, where it has none now.
func (n *names) egressOf(id egress.ID, of []string) egressName {
	was := n.ids[id]
	has := func(name string) (netip.Addr, bool) {
		for _, a := range n.last.Egresses[name].Addresses {
			if a.ID == id {
				return a.IP, true
			}
		}
		return netip.Addr{}, false
	}
	for _, name := range of { // of a static IP there may be several
		if ip, ok := has(name); ok {
			return egressName{name: name, ip: ip}
		}
	}
	if was.of == n.last {
		return was
	}
	ip, ok := has(was.name)
	if !ok {
		for name := range n.last.Egresses {
			if ip, ok = has(name); ok {
				was.name = name
				break
			}
		}
	}
	if ok {
		was.ip = ip
	}
	was.of = n.last
	n.ids[id] = was
	return was
}

// nodeOf returns the name of a node by its index; "": it is gone.
func (n *names) nodeOf(index int) string {
	if n.nodes == nil {
		n.nodes = make(map[int]string, len(n.last.Nodes))
		for name, node := range n.last.Nodes {
			n.nodes[node.Index] = name
		}
	}
	return n.nodes[index]
}

// of returns what the connections of a pod by an egress IP have in common, as it is now.
func (n *names) of(c *conntrack.Flow) *named {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.last == nil {
		return &named{}
	}
	k := namedKey{c.Source, egress.ID(c.Mark & egress.Mark(egress.MaxID))}
	if is := n.known[k]; is != nil {
		return is
	}
	pod := n.pods[c.Source]
	e := n.egressOf(k.id, pod.egresses)
	is := &named{egress: e.name, ip: e.ip, namespace: pod.namespace, name: pod.name}
	if index, overlaid := egress.IndexOfSource(c.Source); overlaid {
		is.node = n.nodeOf(index)
	}
	n.known[k] = is
	return is
}

// line says of a connection what does not change.
func (is *named) line(node string, c *conntrack.Flow) natlog.Line {
	l := natlog.Line{
		Version: natlog.Version, Node: node, PodIP: c.Source, PodPort: c.SourcePort, Protocol: protocolName(c.Protocol), DestinationIP: c.Destination,
		DestinationPort: c.DestinationPort, ID: c.ID, EgressIP: c.Translated, Port: c.Port,
		Egress: is.egress, PodNamespace: is.namespace, PodName: is.name, PodNode: is.node,
	}
	if _, overlaid := egress.IndexOfSource(c.Translated); overlaid { // the gateway translates it once more
		l.OverlayIP, l.OverlayPort, l.EgressIP, l.Port = c.Translated, c.Port, is.ip, 0
	}
	if _, overlaid := egress.IndexOfSource(c.Source); overlaid { // as it does here
		l.OverlayIP, l.OverlayPort, l.PodIP, l.PodPort = c.Source, c.SourcePort, netip.Addr{}, 0
	}
	return l
}

// protocols are the names of the protocols that have ports or identifiers.
var protocols = map[uint8]string{
	unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_ICMP: "icmp", unix.IPPROTO_ICMPV6: "icmpv6", unix.IPPROTO_SCTP: "sctp",
	unix.IPPROTO_UDPLITE: "udplite", unix.IPPROTO_DCCP: "dccp", unix.IPPROTO_ESP: "esp", unix.IPPROTO_GRE: "gre",
}

func protocolName(n uint8) string { return cmp.Or(protocols[n], strconv.Itoa(int(n))) }
