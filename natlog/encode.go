package natlog

import (
	"encoding/json"
	"net/netip"
	"strconv"
	"time"
)

// appendLine appends a line as encoding/json has it, with its end: without reflection, since there are tens of
// thousands a second.
func appendLine(b []byte, l *Line) []byte {
	e := encoder{append(b, `{"version":`...)}
	e.b = strconv.AppendInt(e.b, int64(l.Version), 10)
	e.text("event", string(l.Event))
	e.at("time", l.Time)
	e.text("node", l.Node)
	e.some("egress", l.Egress)
	e.ip("egress_ip", l.EgressIP)
	e.number("port", uint64(l.Port))
	e.some("pod_namespace", l.PodNamespace)
	e.some("pod_name", l.PodName)
	e.ip("pod_ip", l.PodIP)
	e.number("pod_port", uint64(l.PodPort))
	e.some("pod_node", l.PodNode)
	e.ip("overlay_ip", l.OverlayIP)
	e.number("overlay_port", uint64(l.OverlayPort))
	e.some("protocol", l.Protocol)
	e.ip("destination_ip", l.DestinationIP)
	e.number("destination_port", uint64(l.DestinationPort))
	e.number("id", uint64(l.ID))
	e.when("start", l.Start)
	e.when("stop", l.Stop)
	e.yes("answered", l.Answered)
	if t := l.Traffic; t != nil {
		e.key("traffic")
		for i, n := range []struct {
			name string
			n    uint64
		}{{"sent_packets", t.SentPackets}, {"sent_bytes", t.SentBytes}, {"received_packets", t.ReceivedPackets}, {"received_bytes", t.ReceivedBytes}} {
			e.b = append(e.b, ",{"[1-min(i, 1)])
			e.b = append(append(append(e.b, '"'), n.name...), `":`...)
			e.b = strconv.AppendUint(e.b, n.n, 10)
		}
		e.b = append(e.b, '}')
	}
	e.yes("unseen", l.Unseen)
	e.some("reason", string(l.Reason))
	e.number("lost", l.Lost)
	e.when("since", l.Since)
	e.some("agent", l.Agent)
	if len(l.Filter) > 0 {
		e.key("filter")
		for i, f := range l.Filter {
			e.b = append(e.b, ",["[1-min(i, 1)])
			e.string(f)
		}
		e.b = append(e.b, ']')
	}
	if l.Sample != 0 {
		e.key("sample")
		e.b = strconv.AppendInt(e.b, int64(l.Sample), 10)
	}
	return append(e.b, "}\n"...)
}

// encoder appends the fields of an object, but the first.
type encoder struct{ b []byte }

func (e *encoder) key(name string) {
	e.b = append(append(append(e.b, `,"`...), name...), `":`...)
}

func (e *encoder) text(name, value string) {
	e.key(name)
	e.string(value)
}

// string appends a string: names are of letters, digits and dashes, and what is none is left to encoding/json.
func (e *encoder) string(s string) {
	for _, c := range []byte(s) {
		if c < ' ' || c > '~' || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			if b, err := json.Marshal(s); err == nil { // a string can always be
				e.b = append(e.b, b...)
			}
			return
		}
	}
	e.b = append(append(append(e.b, '"'), s...), '"')
}

func (e *encoder) some(name, value string) {
	if value != "" {
		e.text(name, value)
	}
}

func (e *encoder) ip(name string, ip netip.Addr) {
	if ip.IsValid() {
		e.key(name)
		e.b = append(ip.AppendTo(append(e.b, '"')), '"')
	}
}

func (e *encoder) number(name string, n uint64) {
	if n != 0 {
		e.key(name)
		e.b = strconv.AppendUint(e.b, n, 10)
	}
}

func (e *encoder) at(name string, t time.Time) {
	e.key(name)
	e.b = append(t.AppendFormat(append(e.b, '"'), time.RFC3339Nano), '"')
}

func (e *encoder) when(name string, t time.Time) {
	if !t.IsZero() {
		e.at(name, t)
	}
}

func (e *encoder) yes(name string, is bool) {
	if is {
		e.key(name)
		e.b = append(e.b, "true"...)
	}
}
