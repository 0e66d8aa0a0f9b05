// SPDX-License-Identifier: Apache-2.0

package caddyfile

import (
	"encoding/json"
	"math"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/dustin/go-humanize"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/recordings"
)

// UnmarshalCaddyfile sets c from Caddyfile tokens. Syntax:
//
//	tailscale_impersonate [<matcher>] {
//	    capability           <name>
//	    client_impersonation reject|strip|authorize
//	    audit
//	    allow_origins        <origin...>
//	    allow_hosts          <host...>
//	    cache_ttl            <duration>
//	    recheck_interval     <duration>
//	    recheck_grace        <duration>
//	    max_connection_age   <duration>
//	    record               <directory>
//	    record_max_size      <size>
//	    record_retention     <duration>
//	    record_required
//	    record_to            <storage> [<arguments>] [{ <options of the storage> }]
//	    record_remove_stored
//	    record_store_within  <duration>
//	    record_input         all
//	    enforced_sessions    exec|attach|port-forward...
//	    recordings           [<path>]
//	    recordings_readers   <pattern...>
//	    whoami               [<path>]
//	    read_only_group      <group>
//	    tailscaled           [<socket>]
//	    events               log
//	    event_body_limit     <size> [refuse]
//	    event_secret_bodies
//	    allow_groups         <pattern...>
//	    deny_groups          <pattern...>
//	    optional_groups      <pattern...>
//	    record_groups        <pattern...>
//	    require_groups
//	    user_prefix          <prefix>
//	    tagged_user          name|id
//	    device_user_prefix   <prefix>
//	    group_prefix         <prefix>
//	    allow_tags           <pattern...>
//	    deny_tags            <pattern...>
//	    deny_shared
//	}
//
// All options are optional, and so is the block. Options that take several values can be
// repeated to add values. Other options can be given once.
func (c *Config) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the directive's name
	if d.NextArg() {
		return d.Errf("unexpected argument %q: options go into a block", d.Val())
	}
	for d.NextBlock(0) {
		known, err := c.UnmarshalOption(d)
		if err != nil {
			return err
		}
		if !known {
			return d.Errf("unknown option %q", d.Val())
		}
	}
	if err := c.Validate(); err != nil {
		return d.WrapErr(err)
	}
	return nil
}

// UnmarshalOption sets the option of c that d is at. It returns known as false, and
// consumes nothing, if the option is not one of c's.
func (c *Config) UnmarshalOption(d *caddyfile.Dispenser) (known bool, err error) {
	switch d.Val() {
	case "capability":
		err = single(d, &c.Capability)
	case "client_impersonation":
		err = single(d, &c.ClientImpersonation)
	case "audit":
		err = on(d, &c.Audit)
	case "allow_origins":
		err = list(d, &c.AllowOrigins)
	case "allow_hosts":
		err = list(d, &c.AllowHosts)
	case "cache_ttl":
		err = duration(d, &c.CacheTTL)
	case "recheck_interval":
		err = duration(d, &c.RecheckInterval)
	case "recheck_grace":
		err = duration(d, &c.RecheckGrace)
	case "max_connection_age":
		err = duration(d, &c.MaxConnectionAge)
	case "record":
		err = single(d, &c.Record)
	case "record_max_size":
		err = size(d, &c.RecordMaxSize)
	case "record_retention":
		err = duration(d, &c.RecordRetention)
	case "record_required":
		err = on(d, &c.RecordRequired)
	case "record_to":
		err = storage(d, &c.RecordToRaw)
	case "record_remove_stored":
		err = on(d, &c.RecordRemoveStored)
	case "record_store_within":
		err = duration(d, &c.RecordStoreWithin)
	case "record_input":
		err = single(d, &c.RecordInput)
	case "enforced_sessions":
		err = list(d, &c.EnforcedSessions)
	case "recordings":
		err = optional(d, &c.Recordings, defaultRecordings)
	case "recordings_readers":
		err = list(d, &c.RecordingsReaders)
	case "whoami":
		err = optional(d, &c.Whoami, defaultWhoami)
	case "read_only_group":
		err = single(d, &c.ReadOnlyGroup)
	case "tailscaled":
		err = optional(d, &c.Tailscaled, defaultTailscaled)
	case "events":
		err = single(d, &c.Events)
	case "event_body_limit":
		err = bodyLimit(d, c)
	case "event_secret_bodies":
		err = on(d, &c.EventSecretBodies)
	case "allow_groups":
		err = list(d, &c.AllowGroups)
	case "deny_groups":
		err = list(d, &c.DenyGroups)
	case "optional_groups":
		err = list(d, &c.OptionalGroups)
	case "record_groups":
		err = list(d, &c.RecordGroups)
	case "require_groups":
		err = on(d, &c.RequireGroups)
	case "user_prefix":
		err = single(d, &c.UserPrefix)
	case "tagged_user":
		err = single(d, &c.TaggedUser)
	case "device_user_prefix":
		err = single(d, &c.DeviceUserPrefix)
	case "group_prefix":
		err = single(d, &c.GroupPrefix)
	case "allow_tags":
		err = list(d, &c.AllowTags)
	case "deny_tags":
		err = list(d, &c.DenyTags)
	case "deny_shared":
		err = on(d, &c.DenyShared)
	default:
		return false, nil
	}
	return true, err
}

// on sets value to true, for an option without arguments.
func on(d *caddyfile.Dispenser, value *bool) error {
	option := d.Val()
	if *value {
		return d.Errf("%s is given twice", option)
	}
	*value = true
	return end(d, option)
}

// duration sets value to the single argument of the option that d is at, a duration.
func duration(d *caddyfile.Dispenser, value **caddy.Duration) error {
	option := d.Val()
	if *value != nil {
		return d.Errf("%s is given twice", option)
	}
	if !d.NextArg() || d.Val() == "" {
		return d.Errf("%s has no value", option)
	}
	parsed, err := caddy.ParseDuration(d.Val())
	if err != nil {
		return d.Errf("%s %q: must be a duration, such as 5s", option, d.Val())
	}
	*value = new(caddy.Duration)
	**value = caddy.Duration(parsed)
	return end(d, option)
}

// refuse is the second argument of event_body_limit.
const refuse = "refuse"

// bodyLimit sets the options of c that event_body_limit, which d is at, stands for.
func bodyLimit(d *caddyfile.Dispenser, c *Config) error {
	option := d.Val()
	if err := bytes(d, &c.EventBodyLimit); err != nil {
		return err
	}
	if d.NextArg() {
		if d.Val() != refuse {
			return d.Errf("unexpected argument %q after %s", d.Val(), option)
		}
		c.EventBodyRefuse = true
	}
	return end(d, option)
}

// size sets value to the single argument of the option that d is at, a number of bytes.
func size(d *caddyfile.Dispenser, value **int64) error {
	option := d.Val()
	if err := bytes(d, value); err != nil {
		return err
	}
	return end(d, option)
}

// bytes sets value to the next argument of the option that d is at, a number of bytes.
func bytes(d *caddyfile.Dispenser, value **int64) error {
	option := d.Val()
	if *value != nil {
		return d.Errf("%s is given twice", option)
	}
	if !d.NextArg() || d.Val() == "" {
		return d.Errf("%s has no value", option)
	}
	parsed, err := humanize.ParseBytes(d.Val())
	if err != nil || parsed > math.MaxInt64 {
		return d.Errf("%s %q: must be a size, such as 64KiB", option, d.Val())
	}
	*value = new(int64)
	**value = int64(parsed)
	return nil
}

// storage sets value to the storage of recordings that follows the option that d is at.
func storage(d *caddyfile.Dispenser, value *json.RawMessage) error {
	option := d.Val()
	if *value != nil {
		return d.Errf("%s is given twice", option)
	}
	if !d.NextArg() || d.Val() == "" {
		return d.Errf("%s has no value", option)
	}
	name := d.Val()
	id := recordings.Namespace + "." + name
	if _, err := caddy.GetModule(id); err != nil {
		remedy := "build Caddy with the module " + id
		if name == "s3" {
			remedy = "build Caddy with xcaddy --with github.com/tailscale-impersonate/caddy-tailscale-impersonate/s3"
		}
		return d.Errf("%s %s: this Caddy has no such storage; %s", option, name, remedy)
	}
	module, err := caddyfile.UnmarshalModule(d, id)
	if err != nil {
		return err
	}
	if _, ok := module.(recordings.Storage); !ok {
		return d.Errf("%s %s: the module %s is not a storage of recordings (%T)", option, name, id, module)
	}
	*value = caddyconfig.JSONModuleObject(module, "storage", name, nil)
	return nil
}

// single sets value to the single argument of the option that d is at.
func single(d *caddyfile.Dispenser, value *string) error {
	option := d.Val()
	if *value != "" {
		return d.Errf("%s is given twice", option)
	}
	if !d.NextArg() || d.Val() == "" {
		return d.Errf("%s has no value", option)
	}
	*value = d.Val()
	return end(d, option)
}

// optional sets value to the argument of the option that d is at, or to otherwise if it
// has none.
func optional(d *caddyfile.Dispenser, value *string, otherwise string) error {
	option := d.Val()
	if *value != "" {
		return d.Errf("%s is given twice", option)
	}
	*value = otherwise
	if d.NextArg() {
		if *value = d.Val(); *value == "" {
			return d.Errf("%s has no value", option)
		}
	}
	return end(d, option)
}

// list appends the arguments of the option that d is at to values.
func list(d *caddyfile.Dispenser, values *[]string) error {
	option := d.Val()
	args := d.RemainingArgs()
	if len(args) == 0 {
		return d.Errf("%s has no value", option)
	}
	*values = append(*values, args...)
	return end(d, option)
}

// end returns an error if an argument or a block follows option.
func end(d *caddyfile.Dispenser, option string) error {
	if d.NextArg() {
		return d.Errf("unexpected argument %q after %s", d.Val(), option)
	}
	if d.NextBlock(d.Nesting()) {
		return d.Errf("%s takes no block", option)
	}
	return nil
}
