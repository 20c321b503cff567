package operator

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// History writes who held an IP, since when, and why, the oldest first, as Get writes records.
func History(ctx context.Context, c *store.Client, ip netip.Addr, format string, w io.Writer) error {
	if err := CheckFormat(format); err != nil {
		return err
	}
	tenures, faulty := c.History(ctx, ip)
	if faulty != nil && tenures == nil {
		return faulty
	}
	explain(tenures)
	l := listing{kind: "history", header: "SINCE NODE FOR WHY FROM"}
	for i, t := range tenures {
		end := time.Now()
		if i+1 < len(tenures) {
			end = tenures[i+1].Since
		}
		l.records = append(l.records, t)
		l.rows = append(l.rows, []string{t.Since.Format("2006-01-02T15:04:05.000Z07:00"), dash(t.Node), age(end, t.Since), string(t.Why), dash(t.From)})
	}
	if err := l.write(format, w); err != nil {
		return fmt.Errorf("printing the history of %s: %w", ip, err)
	}
	return faulty
}

// explain names what a claimer cannot know: that the owner before it had not given the IP back, so its lease has ended.
func explain(tenures []egress.Tenure) {
	for i := 1; i < len(tenures); i++ {
		if before := tenures[i-1]; tenures[i].Why == egress.ReasonClaim && before.Node != "" {
			tenures[i].Why, tenures[i].From = egress.ReasonCrash, before.Node
		}
	}
}
