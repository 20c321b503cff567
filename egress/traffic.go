package egress

import "net/netip"

// Traffic is what has passed a gateway by an egress IP since the gateway got it. Bytes are those of the IP packets.
type Traffic struct {
	SentPackets     uint64 `json:"sentPackets"`
	SentBytes       uint64 `json:"sentBytes"`
	ReceivedPackets uint64 `json:"receivedPackets"`
	ReceivedBytes   uint64 `json:"receivedBytes"`
}

// MaxTraffic is how many IPs a NodeTraffic has at most: more than a node may hold.
const MaxTraffic = 1024

// NodeTraffic is what an agent answers when it is asked for traffic: that of the egress IPs that its node may send with.
type NodeTraffic struct {
	Node string                 `json:"node"`
	IPs  map[netip.Addr]Traffic `json:"ips"`
}
