package natlog

import (
	"net/netip"
	"time"
)

// Version is that of the lines' schema. Fields may come without another one; one that goes, or means something else,
// makes it another.
const Version = 1

// Event is the kind of a line.
type Event string

// The events. The last three are of the log itself.
const (
	New Event = "new" // a connection began
	// a connection was there when the log began, or was found after a loss: it began some time before
	Known Event = "known"
	// a connection ended, for the kernel: what a TCP connection leaves, or one without packets, stays in the table for
	// minutes
	End Event = "end"

	Lost     Event = "lost"      // lines are missing
	LogStart Event = "log_start" // an agent begins to write
	LogStop  Event = "log_stop"  // it ends in order
)

// Line is a line of the log. Which fields are there depends on the Event; docs/natlog.md has them all.
type Line struct {
	Version int       `json:"version"`
	Event   Event     `json:"event"`
	Time    time.Time `json:"time"` // when the agent heard of it
	Node    string    `json:"node"`

	Egress       string     `json:"egress,omitempty"`
	EgressIP     netip.Addr `json:"egress_ip,omitzero"`
	Port         uint16     `json:"port,omitempty"` // of the egress IP; the identifier of an ICMP echo
	PodNamespace string     `json:"pod_namespace,omitempty"`
	PodName      string     `json:"pod_name,omitempty"`
	PodIP        netip.Addr `json:"pod_ip,omitzero"`
	PodPort      uint16     `json:"pod_port,omitempty"`
	// PodNode is the node of the pod, where the gateway translates for it. The line of that node has the pod, and the
	// same overlay address and port.
	PodNode         string     `json:"pod_node,omitempty"`
	OverlayIP       netip.Addr `json:"overlay_ip,omitzero"`
	OverlayPort     uint16     `json:"overlay_port,omitempty"`
	Protocol        string     `json:"protocol,omitempty"`
	DestinationIP   netip.Addr `json:"destination_ip,omitzero"`
	DestinationPort uint16     `json:"destination_port,omitempty"`
	ID              uint32     `json:"id,omitempty"` // of the kernel's entry

	Start    time.Time `json:"start,omitzero"` // when the connection began; none: before the log did
	Stop     time.Time `json:"stop,omitzero"`
	Answered bool      `json:"answered,omitempty"` // of an end: the destination had answered
	Traffic  *Traffic  `json:"traffic,omitempty"`  // of an end, where the kernel counts (nf_conntrack_acct)
	Unseen   bool      `json:"unseen,omitempty"`   // of an end: it is gone, and the kernel did not tell when it went

	Reason Reason    `json:"reason,omitempty"` // of a loss
	Lost   uint64    `json:"lost,omitempty"`   // how many lines, or events that would have been lines
	Since  time.Time `json:"since,omitzero"`   // of a loss: the first was lost then

	Agent  string   `json:"agent,omitempty"`  // of a log_start: the version of the agent
	Filter []string `json:"filter,omitempty"` // of a log_start
	Sample int      `json:"sample,omitempty"` // one connection in so many is in the log; none: all are
}

// Traffic is what a connection sent and received, from the IP header on.
type Traffic struct {
	SentPackets     uint64 `json:"sent_packets"`
	SentBytes       uint64 `json:"sent_bytes"`
	ReceivedPackets uint64 `json:"received_packets"`
	ReceivedBytes   uint64 `json:"received_bytes"`
}

// Reason says why lines were lost.
type Reason string

// The reasons.
const (
	LostSocket Reason = "socket" // the agent did not read the kernel's events in time
	LostQueue  Reason = "queue"  // lines came faster than they were written
	LostWrite  Reason = "write"  // they could not be written, as on a full disk
)

// Reasons are all of them.
var Reasons = []Reason{LostSocket, LostQueue, LostWrite}
