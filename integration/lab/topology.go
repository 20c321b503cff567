package lab

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
)

// Addresses that are the same in every lab.
var (
	// OutsideIP and OutsideIP6 are the addresses behind the outside host that pods send to.
	OutsideIP  = netip.MustParseAddr("203.0.113.10")
	OutsideIP6 = netip.MustParseAddr("2001:db8::10")
	// OutsideLAN is the outside host's address on the LAN, the nodes' default gateway.
	OutsideLAN = netip.MustParseAddr("10.10.0.200")
	// ControlIP is the address of etcd and the API server on the LAN.
	ControlIP = netip.MustParseAddr("10.10.0.250")
)

// Ports.
const (
	EchoPort         = 7    // of the outside host, TCP and UDP: the echo service's number (RFC 862)
	apiPort          = 6443 // of ControlIP
	etcdPort         = 2379 // of ControlIP, or of the members' own hosts
	etcdPeerPort     = 2380 // there too, for members; on 127.0.0.1 where there is one, as the two below
	kubeEtcdPort     = 2381
	kubeEtcdPeerPort = 2382
)

// family is what differs between IPv4 and IPv6: the numbers.
type family struct {
	lan      string // host number -> address on the LAN
	lanBits  int
	pod      string // node number, pod number -> pod address; number 1 is the node's own
	podBits  int
	hostBits int
	cluster  netip.Prefix // all pods
	outside  netip.Addr   // behind the outside host
	sysctl   string       // the sysctl that forwards
}

// Host numbers on the LAN; node n has nodeHost+n.
const (
	nodeHost    = 100
	outsideHost = 200
	controlHost = 250
	etcdHost    = 250 // member n has etcdHost+n
)

// lanHost is a host on the LAN that is no node.
type lanHost struct {
	name   string
	number int
}

var control = lanHost{"control", controlHost}

// hosts returns the hosts that are no nodes: the outside host, the control host, and those of etcd's members where they
// have any. etcd is on all but the first.
func (l *Lab) hosts() []lanHost {
	all := []lanHost{{"outside", outsideHost}, control}
	if l.cfg.EtcdMembers > 1 {
		for _, m := range l.members() {
			all = append(all, m.host)
		}
	}
	return all
}

// families returns those that the kernel has.
func families() []family {
	fs := []family{{
		lan: "10.10.0.%d", lanBits: 24, pod: "10.244.%d.%d", podBits: 24, hostBits: 32,
		cluster: netip.MustParsePrefix("10.244.0.0/16"), outside: OutsideIP, sysctl: "net/ipv4/ip_forward",
	}}
	if _, err := os.Stat("/proc/sys/net/ipv6"); err == nil {
		fs = append(fs, family{
			lan: "fd10::%d", lanBits: 64, pod: "fd44:%d::%d", podBits: 64, hostBits: 128,
			cluster: netip.MustParsePrefix("fd44::/16"), outside: OutsideIP6, sysctl: "net/ipv6/conf/all/forwarding",
		})
	}
	return fs
}

func (f family) host(n int) netip.Addr       { return netip.MustParseAddr(fmt.Sprintf(f.lan, n)) }
func (f family) node(n int) netip.Addr       { return f.host(nodeHost + n) }
func (f family) podIP(n, p int) netip.Addr   { return netip.MustParseAddr(fmt.Sprintf(f.pod, n, p)) }
func (f family) podCIDR(n int) netip.Prefix  { return netip.PrefixFrom(f.podIP(n, 0), f.podBits) }
func (f family) onLAN(n int) netip.Prefix    { return netip.PrefixFrom(f.host(n), f.lanBits) }
func (f family) onCNI(n, p int) netip.Prefix { return netip.PrefixFrom(f.podIP(n, p), f.podBits) }

// NodeName returns the name of node n, 1 and up.
func NodeName(n int) string { return "node-" + strconv.Itoa(n) }

// NodeIP returns the IPv4 address of node n on the LAN.
func NodeIP(n int) netip.Addr { return families()[0].node(n) }

// NodeIPs returns the addresses of node n on the LAN, one for each family that the kernel has, IPv4 first.
func NodeIPs(n int) []netip.Addr {
	var ips []netip.Addr
	for _, f := range families() {
		ips = append(ips, f.node(n))
	}
	return ips
}

// NodeMAC returns the MAC address that node n has on the LAN.
func NodeMAC(n int) [6]byte { return [6]byte(mac(NodeIP(n))) }

// NodeNumber returns n of the node name, or an error when the lab has no such node.
func (l *Lab) NodeNumber(node string) (int, error) {
	n, err := strconv.Atoi(strings.TrimPrefix(node, "node-"))
	if err != nil || NodeName(n) != node || n < 1 || n > l.cfg.Nodes {
		return 0, fmt.Errorf("node %q: lab %q has %s to %s", node, l.cfg.Name, NodeName(1), NodeName(l.cfg.Nodes))
	}
	return n, nil
}

// nodes returns all node numbers.
func (l *Lab) nodes() []int {
	ns := make([]int, l.cfg.Nodes)
	for i := range ns {
		ns[i] = i + 1
	}
	return ns
}

// mac returns the MAC address of the link with an IPv4 address: the same after a reboot of its host, and readable in a
// capture.
func mac(ip netip.Addr) net.HardwareAddr {
	b := ip.As4()
	return net.HardwareAddr{0x02, 0x00, b[0], b[1], b[2], b[3]}
}

// Namespaces. A pod's begins with "pod." and no other does, so no two labs can mean different things by one name.
func (l *Lab) netns(what string) string { return "egret-" + l.cfg.Name + "-" + what }

func podNetns(pod string) string { return "pod." + strings.Replace(pod, "/", ".", 1) }
