package store

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
)

// firstMembers is when the members are asked for first, unless Config says otherwise: where one Service stands for all of
// them, a member that stops takes the connection of who knows no other with it, and the next one may go to the same
// member for a second. Most commands are over by then.
const firstMembers = 100 * time.Millisecond

// followMembers adds the members of etcd to the configured endpoints until the Client is closed, so that it outlives
// the replacement of all that it was configured with, and looks whether etcd is full.
func (c *Client) followMembers(cfg Config) {
	ctx := c.etcd.Ctx()
	for wait := cmp.Or(cfg.MemberInterval, firstMembers); sleep(ctx, wait); wait = cmp.Or(cfg.MemberInterval, DefaultMemberInterval) {
		if err := c.learnMembers(ctx, cfg); err != nil && ctx.Err() == nil {
			c.log.Debug("members of etcd are not known, the endpoints stay as they are", "err", err)
		}
		c.AskNoSpace(ctx)
	}
}

// learnMembers asks for the members once. The configured endpoints always stay: they may be of a load balancer. A
// member's URL is added when the same etcd has answered there, since what a member says of itself may be of use in its
// own network only.
func (c *Client) learnMembers(ctx context.Context, cfg Config) error {
	try, cancel := context.WithTimeout(ctx, requestTimeout)
	resp, err := c.etcd.MemberList(try)
	cancel()
	if err != nil {
		return fmt.Errorf("listing the members of etcd: %w", err)
	}
	was := c.etcd.Endpoints()
	now := slices.Clone(cfg.Endpoints)
	for _, u := range advertised(cfg, resp.Members) {
		if slices.Contains(was, u) || c.answers(ctx, u, resp.Header.ClusterId) {
			now = append(now, u)
		}
	}
	if !slices.Equal(was, now) {
		c.etcd.SetEndpoints(now...)
		c.log.Info("members of etcd changed", "endpoints", now)
	}
	return nil
}

// answers reports whether the etcd of that cluster id answers at the endpoint.
func (c *Client) answers(ctx context.Context, endpoint string, cluster uint64) bool {
	conn, err := c.etcd.Dial(endpoint)
	if err != nil {
		return false
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	resp, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte(c.prefix), CountOnly: true}, grpc.WaitForReady(false))
	return err == nil && resp.Header.ClusterId == cluster
}

// advertised returns the client URLs of the members, sorted, without those that are configured, and those that cannot
// be meant for this machine: of another scheme, whose credentials would be others, and of a loopback unless all that is
// configured is one.
func advertised(cfg Config, members []*pb.Member) []string {
	scheme, local := "", true
	configured := map[string]bool{}
	for i, e := range cfg.Endpoints {
		s, host, ok := strings.Cut(e, "://")
		if !ok {
			host = e
			if s = "http"; cfg.TLS != nil {
				s = "https"
			}
		}
		if i == 0 {
			scheme = s // the etcd client goes by the first, too
		}
		configured[host] = true
		local = local && loopback(&url.URL{Host: host})
	}
	var out []string
	for _, m := range members {
		if m.IsLearner {
			continue // it answers neither reads nor writes
		}
		for _, raw := range m.ClientURLs {
			u, err := url.Parse(raw)
			if err == nil && u.Scheme == scheme && !configured[u.Host] && (local || !loopback(u)) {
				out = append(out, raw)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// loopback reports whether the URL's host is this machine, whoever reads it.
func loopback(u *url.URL) bool {
	host := u.Hostname()
	a, _ := netip.ParseAddr(host)
	return host == "localhost" || a.IsLoopback() || a.IsUnspecified()
}
