// Package cloud has the network of a cloud send what is for an egress IP to the node that owns it, where that network
// delivers by its own records and hears no ARP: the address is assigned to the network interface of the owner's node.
// Package cloud/aws says it to EC2.
//
// A controller follows owners/ in etcd. The lock of an IP is there as soon as a node has claimed it, so the address
// moves while the claimer still waits for the permits of the former owner to end. Several replicas run; an election
// in etcd picks the one that assigns. It writes cloud/<ip>, which says that the address is Egret's to move and to
// take away, and nothing else in etcd, nothing in the kernel.
//
// The cloud is the only one that knows who has an address, and it has no fencing: what a leader asked for may be done
// after another leads, or after the IP has another owner. So:
//   - Calls about one address never overlap. After one whose outcome is not known, nothing is asked for the address
//     until it was read who has it.
//   - Right before a call a transaction requires that this replica leads, and that the IPs have no newer owner than
//     the call goes by.
//   - What was read is trusted for CheckInterval, and less after a call of unknown outcome, or a change of leaders: a
//     request may be done late. Whoever has the address then, it goes to the present owner.
//   - Where the cloud moves an address in one step (AWS: IPv4), no two interfaces ever have it. Where it does not
//     (IPv6), it is taken away first, and assigned only once it was read, or answered, that nobody has it.
//   - An address that Egret has not assigned is never taken from who has it. The first assignment asks the cloud to
//     refuse if anybody has it.
//   - It is taken away when its allocation is gone. An address without an owner stays where it is. An error never
//     takes one away.
//   - What the cloud refuses for one address, or interface, does not hold up others. A steady state asks nothing but
//     one read in CheckInterval.
//
// It does not choose owners, and changes no addresses of a node's operating system: agents do. A static egress IP is
// an address of its node already.
package cloud
