// Package failover measures how long a pod is without its egress IP when the owner of the IP fails, or gives it away:
// many times over, in a lab of its own, by a probe of 1 ms from a pod on a node that stays. It writes the gaps as CSV
// and their distribution as SVG; `egret-lab bench failover` runs it, docs/failover.md has what it measured. It owns
// nothing but the lab that it makes and removes, and judges nothing but the source addresses.
package failover
