package natlog

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"time"
)

// Reply is the Answer of the agent of a node.
type Reply struct {
	Node string `json:"node"`
	Answer
}

// Query returns the parameters by which an agent is asked.
func (q Question) Query() url.Values {
	v := url.Values{
		"ip": {q.IP.String()}, "port": {strconv.Itoa(int(q.Port))}, "from": {q.From.UTC().Format(time.RFC3339Nano)}, "to": {q.To.UTC().Format(time.RFC3339Nano)},
	}
	if q.Destination.IsValid() {
		v.Set("destination", q.Destination.String())
	}
	if q.Protocol != "" {
		v.Set("protocol", q.Protocol)
	}
	return v
}

// ParseQuestion reads what Query returns.
func ParseQuestion(v url.Values) (q Question, err error) {
	var errs []error
	note := func(what string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s %q: %w", what, v.Get(what), err))
		}
	}
	q.IP, err = netip.ParseAddr(v.Get("ip"))
	note("ip", err)
	q.IP = q.IP.Unmap()
	port, err := strconv.ParseUint(v.Get("port"), 10, 16)
	note("port", err)
	q.Port = uint16(port)
	q.From, err = time.Parse(time.RFC3339Nano, v.Get("from"))
	note("from", err)
	q.To, err = time.Parse(time.RFC3339Nano, v.Get("to"))
	note("to", err)
	if v.Has("destination") {
		q.Destination, err = netip.ParseAddr(v.Get("destination"))
		note("destination", err)
		q.Destination = q.Destination.Unmap()
	}
	q.Protocol = v.Get("protocol")
	if len(errs) == 0 && !q.From.Before(q.To) {
		errs = append(errs, errors.New("from and to: want a time, and a later one"))
	}
	return q, errors.Join(errs...)
}

// Compare orders connections by pod and destination.
func Compare(a, b Line) int {
	return cmp.Or(cmp.Compare(a.PodNamespace, b.PodNamespace), cmp.Compare(a.PodName, b.PodName), a.PodIP.Compare(b.PodIP),
		a.DestinationIP.Compare(b.DestinationIP), cmp.Compare(a.DestinationPort, b.DestinationPort), cmp.Compare(a.PodPort, b.PodPort), a.Start.Compare(b.Start))
}
