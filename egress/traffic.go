package egress

import (
	"net/netip"
	"time"
)

// Traffic is what has passed a gateway by an egress IP since the gateway got it. Bytes are those of the IP packets.
type Traffic struct {
	SentPackets     uint64 `json:"sentPackets"`
	SentBytes       uint64 `json:"sentBytes"`
	ReceivedPackets uint64 `json:"receivedPackets"`
	ReceivedBytes   uint64 `json:"receivedBytes"`
}

// MaxTraffic is how many IPs a NodeTraffic has at most: more than a node may hold.
const MaxTraffic = 1024

// NodeTraffic is what an agent answers when it is asked for traffic: that of the egress IPs that its node may send
// with.
type NodeTraffic struct {
	Node string `json:"node"`
	// Read is when that was read, since the node booted: by a clock that nobody sets, so that what two answers are
	// apart is right. Zero: it is not known, as of an agent of an older version. In JSON, nanoseconds.
	Read time.Duration          `json:"read"`
	IPs  map[netip.Addr]Traffic `json:"ips"`
}
