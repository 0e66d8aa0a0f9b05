// SPDX-License-Identifier: Apache-2.0

package impersonate

import "go.uber.org/zap"

// Fields are who id is, for a line of the log.
func (id *Identity) Fields() []zap.Field {
	return []zap.Field{
		zap.String("node", id.Node),
		zap.String("user", id.User),
		zap.Strings("groups", id.Groups),
		zap.String("source", string(id.Source)),
	}
}
