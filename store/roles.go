package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"go.etcd.io/etcd/api/v3/authpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Grant is a right of a role: to read, and where Write says so to write, a key or all that begin with it. Keys are
// without a Client's prefix.
type Grant struct {
	Key   string
	One   bool // the key alone
	Write bool
}

// What each part of Egret may do in an etcd that has users. A key that a part begins to use has to be entered here:
// TestEachPartWorksUnderItsRole in this package, and the tests of crdsync that run under its role, fail otherwise.
//
// An agent writes agents/ and owners/ of every node, not of its own alone: who revokes the lease of a dead node has to
// be allowed to write all keys that are under it, and a lock is one key, whoever has it.
//
// It reads allocations for `egret check`, which runs beside it, and for `egret who` and `egret trace`, which ask it from
// there, the blocks, their history, and who stands for crdsync's election.
var (
	// the first is what Dial asks for
	AgentGrants = append([]Grant{{Key: "", One: true}, {Key: PermitKey, Write: true}}, grants(
		[]string{PoolPrefix, EgressPrefix, AllocationPrefix, NodePrefix, ServicePrefix, PodPrefix, PinPrefix, CordonPrefix, MembersByNode, MembersByEgress,
			BlockPrefix, BlockHistoryPrefix, CrdsyncElection.prefix()},
		[]string{AgentPrefix, OwnerPrefix, MovePrefix, HistoryPrefix, SuspicionPrefix})...)
	// Pins, history, cordons and suspicions are crdsync's to delete, with the IP or the Node that they are of.
	CrdsyncGrants = append([]Grant{{Key: CompactionKey, One: true, Write: true}}, grants(
		[]string{""},
		[]string{PoolPrefix, EgressPrefix, AllocationPrefix, IDPrefix, CounterPrefix, MembersByNode, MembersByEgress, BlockPrefix, BlockHistoryPrefix, NodePrefix,
			ServicePrefix, PodPrefix, EventRecordPrefix, CrdsyncElection.prefix(), PinPrefix, HistoryPrefix, CordonPrefix, SuspicionPrefix})...)
	// The controller of cloud addresses writes down which of them it assigned.
	CloudGrants = append([]Grant{{Key: "", One: true}}, grants(
		[]string{PoolPrefix, AllocationPrefix, NodePrefix, OwnerPrefix}, []string{CloudPrefix, CloudElection.prefix()})...)
	OperatorGrants = grants([]string{""}, []string{MovePrefix, PinPrefix, CordonPrefix, ActPrefix})
)

func grants(read, write []string) (out []Grant) {
	for _, k := range read {
		out = append(out, Grant{Key: k})
	}
	for _, k := range write {
		out = append(out, Grant{Key: k, Write: true})
	}
	return out
}

// Role is a role of etcd's, and the users that have it.
type Role struct {
	Name   string
	Users  []string
	Grants []Grant
}

// RoleName is the name of the role that a part of the Egret with a prefix has: two that share an etcd have roles of
// their own.
func RoleName(prefix, part string) string {
	return strings.Trim(strings.ReplaceAll(strings.Trim(prefix, "/"), "/", "-")+"-"+part, "-")
}

// RoleChange is one change of etcd's users and roles.
type RoleChange struct {
	Etcdctl string // as etcdctl's arguments
	Narrows bool   // it takes a right away, which a part of another version may use
	do      func(context.Context, *clientv3.Client) error
}

// DiffRoles returns what has to change for users and roles to be there, in this order: with each part of it done,
// nobody has lost what he needs. More are the roles that the users have besides, as "user: roles": they may give them
// more than what is listed. Users and roles that are not named are not looked at. Where etcd has users already, it
// takes one with the role root to ask.
func (c *Client) DiffRoles(ctx context.Context, roles []Role) (changes []RoleChange, more []string, err error) {
	for _, r := range roles {
		have, err := c.etcd.RoleGet(ctx, r.Name)
		missing := errors.Is(err, rpctypes.ErrRoleNotFound)
		if err != nil && !missing {
			return nil, nil, fmt.Errorf("reading role %s of etcd: %w", r.Name, err)
		}
		if missing {
			changes = append(changes, RoleChange{Etcdctl: "role add " + r.Name, do: func(ctx context.Context, e *clientv3.Client) error {
				_, err := e.RoleAdd(ctx, r.Name)
				return err
			}})
			have = &clientv3.AuthRoleGetResponse{}
		}
		changes = append(changes, c.diffGrants(r, have.Perm)...)
		for _, u := range r.Users {
			has, err := c.etcd.UserGet(ctx, u)
			missing := errors.Is(err, rpctypes.ErrUserNotFound)
			if err != nil && !missing {
				return nil, nil, fmt.Errorf("reading user %s of etcd: %w", u, err)
			}
			if missing {
				changes = append(changes, addUser(u))
				has = &clientv3.AuthUserGetResponse{}
			}
			if !slices.Contains(has.Roles, r.Name) {
				changes = append(changes, giveRole(u, r.Name))
			}
			if others := slices.DeleteFunc(has.Roles, func(name string) bool { return name == r.Name }); len(others) > 0 {
				more = append(more, u+": "+strings.Join(others, ", "))
			}
		}
	}
	return changes, more, nil
}

func addUser(user string) RoleChange {
	return RoleChange{Etcdctl: "user add " + user + " --no-password", do: func(ctx context.Context, e *clientv3.Client) error {
		_, err := e.UserAddWithOptions(ctx, user, "", &clientv3.UserAddOptions{NoPassword: true})
		return err
	}}
}

func giveRole(user, role string) RoleChange {
	return RoleChange{Etcdctl: "user grant-role " + user + " " + role, do: func(ctx context.Context, e *clientv3.Client) error {
		_, err := e.UserGrantRole(ctx, user, role)
		return err
	}}
}

// diffGrants compares a role with what etcd has of it. What is too much goes last.
func (c *Client) diffGrants(r Role, have []*authpb.Permission) (changes []RoleChange) {
	type span struct{ key, end string }
	is := map[span]authpb.Permission_Type{}
	for _, p := range have {
		is[span{string(p.Key), string(p.RangeEnd)}] = p.PermType
	}
	for _, g := range r.Grants {
		key, end, kind, prefix := c.key(g.Key), "", authpb.READ, ""
		if !g.One {
			end, prefix = clientv3.GetPrefixRangeEnd(key), "--prefix=true "
		}
		if g.Write {
			kind = authpb.READWRITE
		}
		was, ok := is[span{key, end}]
		delete(is, span{key, end})
		if ok && was == kind {
			continue
		}
		text := fmt.Sprintf("role grant-permission %s%s %s %s", prefix, r.Name, strings.ToLower(kind.String()), key)
		narrows := ok && kind == authpb.READ // from a right to write
		changes = append(changes, RoleChange{text, narrows, func(ctx context.Context, e *clientv3.Client) error {
			_, err := e.RoleGrantPermission(ctx, r.Name, key, end, clientv3.PermissionType(kind))
			return err
		}})
	}
	for _, p := range have {
		key, end := string(p.Key), string(p.RangeEnd)
		if _, ok := is[span{key, end}]; !ok {
			continue
		}
		text := fmt.Sprintf("role revoke-permission %s %q %q", r.Name, key, end)
		changes = append(changes, RoleChange{text, true, func(ctx context.Context, e *clientv3.Client) error {
			_, err := e.RoleRevokePermission(ctx, r.Name, key, end)
			return err
		}})
	}
	return changes
}

// ChangeRoles makes the changes, until one fails. Whoever was faster with one of them has done it.
func (c *Client) ChangeRoles(ctx context.Context, changes []RoleChange) error {
	for _, change := range changes {
		err := change.do(ctx, c.etcd)
		if err != nil && !errors.Is(err, rpctypes.ErrRoleAlreadyExist) && !errors.Is(err, rpctypes.ErrUserAlreadyExist) {
			return fmt.Errorf("changing etcd's users (%s): %w", change.Etcdctl, err)
		}
	}
	return nil
}

// AuthEnabled reports whether etcd asks its clients who they are, and holds them to their roles.
func (c *Client) AuthEnabled(ctx context.Context) (bool, error) {
	s, err := c.etcd.AuthStatus(ctx)
	if err != nil {
		return false, fmt.Errorf("asking whether etcd has users: %w", err)
	}
	return s.Enabled, nil
}

// EnableAuth makes root etcd's user that may do everything, if it is not, and has etcd hold all clients to their roles
// from then on. Who cannot prove to be a user is refused everything.
func (c *Client) EnableAuth(ctx context.Context, root string) error {
	for _, err := range []error{
		ignore(addUser(root).do(ctx, c.etcd), rpctypes.ErrUserAlreadyExist),
		ignore(second(c.etcd.RoleAdd(ctx, "root")), rpctypes.ErrRoleAlreadyExist),
		giveRole(root, "root").do(ctx, c.etcd),
		second(c.etcd.AuthEnable(ctx)),
	} {
		if err != nil {
			return fmt.Errorf("enabling etcd's users: %w", err)
		}
	}
	return nil
}

func second[T any](_ T, err error) error { return err }

func ignore(err, which error) error {
	if errors.Is(err, which) {
		return nil
	}
	return err
}

// Lacks returns the keys that the Client's user may not use as the grants say, in their order. It asks with
// transactions that never change anything: etcd looks at the rights of all that a transaction could do.
func (c *Client) Lacks(ctx context.Context, grants []Grant) (keys []string, err error) {
	denied := func(grants ...Grant) (bool, error) {
		never := clientv3.Compare(clientv3.CreateRevision(c.key(grants[0].Key)), "<", 0)
		var then []clientv3.Op
		for _, g := range grants {
			then = append(then, c.use(g))
		}
		_, err := c.txn(ctx, []clientv3.Cmp{never}, then, nil)
		if err != nil && !errors.Is(err, rpctypes.ErrPermissionDenied) {
			return false, fmt.Errorf("asking what etcd allows: %w", err)
		}
		return err != nil, nil
	}
	if any, err := denied(grants...); err != nil || !any {
		return nil, err
	}
	for _, g := range grants {
		switch no, err := denied(g); {
		case err != nil:
			return nil, err
		case no && g.Write:
			keys = append(keys, "write "+c.key(g.Key))
		case no:
			keys = append(keys, "read "+c.key(g.Key))
		}
	}
	return keys, nil
}

// use returns an operation that takes the right.
func (c *Client) use(g Grant) clientv3.Op {
	key := c.key(g.Key)
	switch {
	case g.Write && g.One:
		return clientv3.OpPut(key, "")
	case g.Write:
		return clientv3.OpPut(key+"-", "")
	case g.One:
		return clientv3.OpGet(key, clientv3.WithKeysOnly())
	}
	return clientv3.OpGet(key, clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithLimit(1))
}
