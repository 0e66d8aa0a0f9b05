// SPDX-License-Identifier: Apache-2.0

package s3

import (
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// UnmarshalCaddyfile sets s from Caddyfile tokens. Syntax:
//
//	record_to s3 {
//	    bucket            <name>
//	    endpoint          <url>
//	    region            <region>
//	    prefix            <prefix>
//	    access_key_id     <id>
//	    secret_access_key <key>
//	    encryption        s3|kms [<key>]
//	    object_lock       governance|compliance <duration>
//	    storage_class     <class>
//	    path_style
//	    trusted_ca        <file>
//	    insecure_http
//	}
//
// Only bucket is required.
func (s *Storage) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the module's name
	if d.NextArg() {
		return d.Errf("unexpected argument %q: options go into a block", d.Val())
	}
	given := make(map[string]bool)
	for d.NextBlock(0) {
		option := d.Val()
		if given[option] {
			return d.Errf("%s is given twice", option)
		}
		given[option] = true
		args := d.RemainingArgs()
		if err := s.set(d, option, args); err != nil {
			return err
		}
		if d.NextBlock(d.Nesting()) {
			return d.Errf("%s takes no block", option)
		}
	}
	return nil
}

// set sets one option.
func (s *Storage) set(d *caddyfile.Dispenser, option string, args []string) error {
	switch option {
	case "path_style":
		s.PathStyle = true
		return count(d, option, args, 0)
	case "insecure_http":
		s.InsecureHTTP = true
		return count(d, option, args, 0)
	case "encryption":
		if len(args) == 2 && args[0] == encryptionKMS {
			s.Encryption, s.KMSKey = args[0], args[1]
			return nil
		}
		if len(args) == 1 && args[0] == encryptionS3 {
			s.Encryption = args[0]
			return nil
		}
		return d.Errf("%s: must be %s, or %s and a key", option, encryptionS3, encryptionKMS)
	case "object_lock":
		if err := count(d, option, args, 2); err != nil {
			return err
		}
		duration, err := caddy.ParseDuration(args[1])
		if err != nil {
			return d.Errf("%s %q: must be a duration, such as 90d", option, args[1])
		}
		s.ObjectLock, s.ObjectLockFor = args[0], caddy.Duration(duration)
		return nil
	}
	values := map[string]*string{
		"bucket": &s.Bucket, "endpoint": &s.Endpoint, "region": &s.Region, "prefix": &s.Prefix,
		"access_key_id": &s.AccessKeyID, "secret_access_key": &s.SecretAccessKey,
		"storage_class": &s.StorageClass, "trusted_ca": &s.TrustedCA,
	}
	value, ok := values[option]
	if !ok {
		return d.Errf("unknown option %q", option)
	}
	if err := count(d, option, args, 1); err != nil {
		return err
	}
	*value = args[0]
	return nil
}

// count returns an error unless there are n arguments, none of them empty.
func count(d *caddyfile.Dispenser, option string, args []string, n int) error {
	switch {
	case len(args) > n:
		return d.Errf("unexpected argument %q after %s", args[n], option)
	case len(args) < n:
		return d.Errf("%s has no value", option)
	}
	for _, arg := range args {
		if arg == "" {
			return d.Errf("%s has no value", option)
		}
	}
	return nil
}

// Interface guards
var _ caddyfile.Unmarshaler = (*Storage)(nil)
