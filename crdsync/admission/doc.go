// Package admission is the validating webhook of Egress and ExternalIPPool: what the schema cannot tell, the API server asks here.
//
// Every replica of crdsync answers, leader or not. It owns a Secret, the webhook's CA, which whoever is first makes, and the caBundle of
// a ValidatingWebhookConfiguration; the serving certificate is in memory only. It decides nothing by itself: crdsync/spec says what is
// wrong, and the conditions of the egresses report the same of objects that came past the webhook.
//
// An update that leaves the spec alone is always let through, so an object that is wrong already can be labelled and deleted. What
// cannot be checked, because the API or etcd cannot be read, is not answered: failurePolicy decides. Two objects that are written at the
// same moment do not see each other.
package admission
